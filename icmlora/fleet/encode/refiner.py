"""Codes that keep a share of what their adapters do, found by looking: where refinement begins, and where it goes on.

    step ──a few looks──▶ code that keeps less than asked ──a fifth of the steps──▶ look ──another step──▶ the others

How much refinement brings back differs from adapter to adapter, by a factor of four. The first steps foretell it
(docs/results/LOG.md), so a code that would end too good or too bad goes on from there with coarser or finer values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

from icmlora.adapter.model import Adapter
from icmlora.base_models.modality import BaseModel
from icmlora.base_models.running.lora_hooks import factors_of
from icmlora.fleet.resources.workers import Tell
from icmlora.generator.codec import Codec
from icmlora.generator.encoding import Encoded, Steps
from icmlora.generator.relaxed import RelaxedCode
from icmlora.generator.scales import OCTAVE
from icmlora.training.effect import LEAST_LOST, Effect, Lost
from icmlora.training.refinement import Refinable, RefineConfig, items_for, refine
from icmlora.training.teacher import Teacher

_COARSER = 3.5  # refinement begins with a code that loses so many times what may be lost
_FIRST = 0.5  # squared error of the first code that is looked at
_MOST_LOOKS = 4
_NEAR = 0.3  # octaves by which a look may miss the share that is looked for
_STRIDE = 3 * OCTAVE  # eighths of an octave between two looks, at most
_CLEARLY = 0.9  # strengths for strong slots have to lose so much less than those for all
# What is lost grows as a power of the step: of plain codes, and of refined ones.
_PLAIN_POWER, _REFINED_POWER = 2.0, 1.4
_PILOT = 5  # of the steps of refinement, one in so many comes before the second look
_MOST_MOVED = 6  # eighths of an octave by which the step changes then
# By how many octaves the steps that remain divide what is lost: so much, and so much more for each octave of the first.
_LATER, _LATER_PER_OCTAVE = 0.6, 0.25


@dataclass(frozen=True)
class Refiner:
    """What it takes to see and to change what codes of an adapter do."""

    base: BaseModel  # in a precision for gradients
    teacher: Teacher  # of what refinement reads of the task
    effect: Effect  # of the adapter on what it does not read
    config: RefineConfig

    @classmethod
    def of(cls, base: BaseModel, adapter: Adapter, samples: Sequence[Any], config: RefineConfig) -> Refiner:
        """Prepare to refine the codes of one adapter; raises as `items_for` does."""
        read, held = items_for(base, adapter, samples, config)
        original = factors_of(adapter)
        teacher = Teacher(base, original, read)
        return cls(base, teacher, Effect(teacher if held is read else Teacher(base, original, held)), config)

    def lost(self, codec: Codec, data: bytes, *, of_few: bool = False) -> Lost:
        """Return the share of the adapter's effect that the bytes of a code lose, as `Effect.lost`."""
        return self.effect.lost(factors_of(codec.decode(data)), of_few=of_few)

    def refine(self, codec: Codec, adapter: Adapter, encoded: Encoded, tell: Tell) -> Encoded:
        """Return a code whose adapter acts more like the original on the samples."""
        return refine_all([Coarse(self, codec, adapter, encoded)], tell)[0]


@dataclass(frozen=True)
class ForShare:
    """What a code is for that is to keep a share of its adapter's effect, and where its refinement begins."""

    keep: float
    steps: Steps
    step: int  # log2 in eighths
    for_strong: bool  # what its strengths make up for: see `strength_of`
    lost: float  # of the effect, by the plain code of this step


@dataclass(frozen=True)
class Coarse:
    """A code that is to be refined."""

    refiner: Refiner
    codec: Codec
    original: Adapter
    encoded: Encoded
    share: ForShare | None = None  # None for a code that is for another limit


def lost_before(keep: float) -> float:
    """Return what share of the effect a code should lose before it is refined to keep one."""
    return min(_COARSER * (1 - keep), 1 - keep / 2)  # halfway to a code that keeps nothing, at most


def coarse_for(keep: float, lost: float, refiner: Refiner, codec: Codec, original: Adapter, steps: Steps) -> Coarse:
    """Return the plain code that loses about a share of its adapter's effect, to be refined until it keeps another."""
    code = cache(lambda step, for_strong: steps.without_faint(step, for_strong=for_strong))

    @cache
    def lost_by(step: int, for_strong: bool) -> float:
        return refiner.lost(codec, code(step, for_strong), of_few=True).of_most

    step, found = near(lost, lambda step: lost_by(step, False), steps.expected(_FIRST))
    if for_strong := lost_by(step, True) < _CLEARLY * found:
        step, found = near(lost, lambda step: lost_by(step, True), step)
    encoded = codec.measure(original, code(step, for_strong))
    return Coarse(refiner, codec, original, encoded, ForShare(keep, steps, step, for_strong, found))


def near(share: float, lost: Callable[[int], float], first: int) -> tuple[int, float]:
    """Return the step, log2 in eighths, whose code loses nearly a share, and what it loses, in a few looks."""
    wanted, step, found = math.log2(max(share, LEAST_LOST)), first, dict[int, float]()
    while step not in found and len(found) < _MOST_LOOKS:
        found[step] = math.log2(max(lost(step), LEAST_LOST))
        if abs(found[step] - wanted) <= _NEAR:
            break
        step += _eighths(wanted - found[step], _PLAIN_POWER, _STRIDE)
    best = min(found, key=lambda step: abs(found[step] - wanted))
    return best, 2 ** found[best]


def refine_all(codes: Sequence[Coarse], tell: Tell) -> list[Encoded]:
    """Refine codes side by side: all on the same base model, and for the same number of steps."""
    base, config = codes[0].refiner.base, codes[0].refiner.config
    relaxed = [RelaxedCode(code.codec, code.original, code.encoded.data, base.device) for code in codes]
    pilot = config.steps // _PILOT if any(code.share is not None for code in codes) else 0
    note = "refining"
    with stoppable(base, lambda: tell(note)):
        for steps in filter(None, (range(pilot), range(pilot, config.steps))):
            if steps.start > 0:
                relaxed = list(map(_moved, codes, relaxed))
            for step in refine(list(map(_refinable, codes, relaxed)), base, config, steps):
                note = f"refining, step {step} of {config.steps}"
                tell(note)
    return [code.codec.measure(code.original, one.to_code()) for one, code in zip(relaxed, codes, strict=True)]


def _refinable(code: Coarse, relaxed: RelaxedCode) -> Refinable:
    keep = None if code.share is None else code.share.keep
    return Refinable(relaxed, code.encoded.weighted_error, code.refiner.teacher, code.refiner.effect, keep)


def _moved(code: Coarse, relaxed: RelaxedCode) -> RelaxedCode:
    """Return the code with the step at which the steps that remain will end at its share, as far as can be told."""
    share = code.share
    if share is None:
        return relaxed
    lost = math.log2(max(code.refiner.lost(code.codec, relaxed.to_code()).of_most, LEAST_LOST))
    end = lost - _LATER - _LATER_PER_OCTAVE * (math.log2(share.lost) - lost)
    move = _eighths(math.log2(max(1 - share.keep, LEAST_LOST)) - end, _REFINED_POWER, _MOST_MOVED)
    if abs(move) < 2:
        return relaxed
    data = share.steps.without_faint(share.step + move, for_strong=share.for_strong)
    moved = RelaxedCode(code.codec, code.original, data, code.refiner.base.device)
    moved.go_on_from(relaxed)
    return moved


def _eighths(octaves: float, power: float, most: int) -> int:
    """Return by how many eighths of an octave the step grows if what is lost grows by so many octaves."""
    return round(min(max(OCTAVE * octaves / power, -most), most))


@contextmanager
def stoppable(base: BaseModel, look: Callable[[], None]) -> Iterator[None]:
    """Look whether to stop before each pass through a base model: texts are written in hundreds of passes."""
    passes = base.model.register_forward_pre_hook(lambda *_: look())
    try:
        yield
    finally:
        passes.remove()
