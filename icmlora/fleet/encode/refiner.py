"""Codes that keep a share of what their adapters do, found by looking: where refinement begins, and where it goes on.

    step ──a few looks──▶ code that keeps less than asked ──a fifth of the steps──▶ look ──another step──▶ the others
                                                                                                             │
                                       done ◀──the last steps again──finer step──◀── keeps too little ──◀── look

How much refinement brings back differs from adapter to adapter, by a factor of four. The first steps foretell it
(docs/results/LOG.md), so a code that would end too good or too bad goes on from there with coarser or finer values. One
that falls short in the end goes on with finer ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from itertools import pairwise, product
from typing import Any

from icmlora.adapter.model import Adapter
from icmlora.base_models.modality import BaseModel
from icmlora.base_models.running.lora_hooks import factors_of
from icmlora.fleet.resources.workers import Tell
from icmlora.generator.codec import Codec
from icmlora.generator.encoding import Encoded, SlotChoice, Steps
from icmlora.generator.relaxed import RelaxedCode
from icmlora.generator.scales import OCTAVE
from icmlora.training.effect import LEAST_LOST, Effect, Lost
from icmlora.training.refinement import Refinable, RefineConfig, has_short_answers, items_for, refine
from icmlora.training.teacher import Teacher

_COARSER = 3.5  # refinement begins with a code that loses so many times what may be lost
_FIRST = 0.5  # squared error of the first code that is looked at
_MOST_LOOKS = 4
_NEAR = 0.3  # octaves by which a look may miss the share that is looked for
_STRIDE = 3 * OCTAVE  # eighths of an octave between two looks, at most
_SIZE_POWER = 0.9  # codes grow as this power of 1 / what is lost, about (docs/results/LOG.md)
# What is lost grows as a power of the step: of plain codes, and of refined ones.
_PLAIN_POWER, _REFINED_POWER = 2.0, 1.4
# Shares of the steps of refinement after which it looks again; a code that falls short does those after the last again.
_LOOKS = 0.2, 0.6
# Eighths of an octave by which the step changes then, or for a code that falls short: at most, and at least where it
# gets finer or coarser. A coarser one takes back what refinement did, and the price of bits makes codes smaller too. It
# may lose so many times what refinement began with, or what it should lose: at some step all slots of a code are faint.
_MOST_MOVED, _LEAST_FINER, _LEAST_COARSER, _MOST_WORSE = 6, 2, 4, 1.5
# By how many octaves the steps that remain divide what is lost: so many after each look, and more after the first one
# if the steps before it have brought more than is usual.
_LATER, _USUAL = (0.3, 0.1), 1.2
_LATER_OF_ANSWERS = 1.2  # after the first look, if answers are short
# A code may lose half more than it is asked to, and at most so much: what other texts would say differs by more.
_SHORT, _MOST_SHORT = 1 / 2, 0.01
_AIM = 0.6  # of the way from what is asked for to that


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
        return refine_all([Coarse(self, codec, adapter, encoded)], tell)[0].encoded


@dataclass(frozen=True)
class ForShare:
    """What a code is for that is to keep a share of its adapter's effect, and what other codes it may become."""

    keep: float
    steps: Steps
    lost: float  # by the code that its refinement begins with
    slots: SlotChoice

    @property
    def most(self) -> float:
        """What a code for it may lose of the effect."""
        return 1 - self.keep + min(_SHORT * (1 - self.keep), _MOST_SHORT)

    @property
    def aim(self) -> float:
        """What it should lose, so that nearly all lose less than is too much."""
        asked = 1 - self.keep
        return max(asked + _AIM * (self.most - asked), LEAST_LOST)


@dataclass(frozen=True)
class Coarse:
    """A code that is to be refined."""

    refiner: Refiner
    codec: Codec
    original: Adapter
    encoded: Encoded
    share: ForShare | None = None  # None for a code that is for another limit

    def relaxed(self, data: bytes) -> RelaxedCode:
        """Return its adapter's code of these bytes, to be changed."""
        return RelaxedCode(self.codec, self.original, data, self.refiner.base.device)


@dataclass(frozen=True)
class Finished:
    """A code that was made of a coarse one, refined or as it was, and what it loses of its adapter's effect."""

    encoded: Encoded
    lost: Lost | None  # None for a code that is not for a share
    falls_short: bool  # of its share

    @classmethod
    def of(cls, code: Coarse, encoded: Encoded) -> Finished:
        """Look at what was made of a code."""
        if code.share is None:
            return cls(encoded, None, falls_short=False)
        lost = code.refiner.lost(code.codec, encoded.data)
        return cls(encoded, lost, falls_short=lost.counted > code.share.most)

    def better(self, other: Finished) -> Finished:
        """Return the one of two that loses less."""
        assert self.lost is not None
        assert other.lost is not None
        return other if other.lost.counted < self.lost.counted else self


def lost_before(keep: float, beyond: float) -> float:
    """Return what share of the effect a code should lose before it is refined to keep one; `beyond` is the effect's."""
    share = min(_COARSER * (1 - keep), 1 - keep / 2)  # halfway to a code that keeps nothing, at most
    return share * math.sqrt(beyond)  # how answers look, of which little counts, comes back with few steps


def coarse_for(keep: float, lost: float, refiner: Refiner, codec: Codec, original: Adapter, steps: Steps) -> Coarse:
    """Return the plain code that loses about a share of its adapter's effect, to be refined until it keeps another.

    Of codes with and without faint slots, of either strengths, it is the one that would be the smallest if all lost
    the same.
    """
    code = cache(steps.with_slots)

    @cache
    def lost_by(step: int, *, slots: SlotChoice) -> float:
        return refiner.lost(codec, code(step, slots), of_few=True).of_most

    def cost(slots: SlotChoice) -> float:
        return len(code(step, slots)) * math.pow(max(lost_by(step, slots=slots), LEAST_LOST), _SIZE_POWER)

    choices = [SlotChoice(has_faint, for_strong) for has_faint, for_strong in product((False, True), repeat=2)]
    step, _ = near(lost, partial(lost_by, slots=choices[0]), steps.expected(_FIRST))
    slots = min(choices, key=cost)
    step, found = near(lost, partial(lost_by, slots=slots), step)
    encoded = codec.measure(original, code(step, slots))
    return Coarse(refiner, codec, original, encoded, ForShare(keep, steps, found, slots))


def near(share: float, lost: Callable[[int], float], first: int) -> tuple[int, float]:
    """Return the step, log2 in eighths, whose code loses nearly a share, and what it loses, in a few looks.

    Between two steps it grows as a power of the step; beyond those, as it usually does.
    """
    wanted, step, found = _octaves(share), first, dict[int, float]()
    while step not in found and len(found) < _MOST_LOOKS:
        found[step] = _octaves(lost(step))
        if abs(found[step] - wanted) <= _NEAR:
            break
        finer = max((step for step in found if found[step] < wanted), default=None)
        coarser = min((step for step in found if found[step] > wanted), default=None)
        if finer is None or coarser is None:
            step += _eighths(wanted - found[step], _PLAIN_POWER, _STRIDE)
        else:
            part = (wanted - found[finer]) / (found[coarser] - found[finer])
            step = finer + round(part * (coarser - finer))
    best = min(found, key=lambda step: abs(found[step] - wanted))
    return best, 2 ** found[best]


def refine_all(codes: Sequence[Coarse], tell: Tell) -> list[Finished]:
    """Refine codes side by side: all on the same base model, and for the same number of steps.

    One that falls short of its share does its last steps again, at a finer quantiser step; the better one is taken.
    """
    base, config = codes[0].refiner.base, codes[0].refiner.config
    running = list(map(_Running.of, codes))
    looks = _LOOKS if any(code.share is not None for code in codes) else ()
    note = "refining"

    def go(which: Sequence[_Running], first: float, last: float) -> None:
        nonlocal note
        steps = range(round(first * config.steps), round(last * config.steps))
        for step in refine([one.work for one in which], base, config, steps):
            note = f"refining, step {step} of {config.steps}"
            tell(note)

    with stoppable(base, lambda: tell(note)):
        for number, (first, last) in enumerate(pairwise([0.0, *looks, 1.0])):
            go(running, first, last)
            if last < 1:
                for one in running:
                    one.foresee(number)
        finished = [one.finished() for one in running]
        short = [number for number, made in enumerate(finished) if made.falls_short]
        for number in short:
            running[number].mend(finished[number])
        go([running[number] for number in short], _LOOKS[-1], 1.0)
        for number in short:
            finished[number] = finished[number].better(running[number].finished())
    return finished


@dataclass(frozen=True)
class _Running:
    """A code that is being refined."""

    code: Coarse
    work: Refinable

    @classmethod
    def of(cls, code: Coarse) -> _Running:
        """Begin with a code as it is."""
        aim = None if code.share is None else code.share.aim
        relaxed, refiner = code.relaxed(code.encoded.data), code.refiner
        return cls(code, Refinable(relaxed, code.encoded.weighted_error, refiner.teacher, refiner.effect, aim))

    def finished(self) -> Finished:
        """Return the code as it is now."""
        return Finished.of(self.code, self.code.codec.measure(self.code.original, self.work.relaxed.to_code()))

    def foresee(self, number: int) -> None:
        """Go on at the step at which the steps that remain will end at its share, as far as can be told."""
        share = self.code.share
        if share is None:
            return
        found = self.code.refiner.lost(self.code.codec, self.work.relaxed.to_code())
        self.work.compare(found.worst)
        lost = _octaves(found.of_most)
        is_first, later = number == 0, _LATER[number]
        if self._has_short_answers:
            if not is_first:  # few predictions tell what it loses, and the last steps bring it far more than text
                return
            later = _LATER_OF_ANSWERS
        if is_first:
            later += max(math.log2(share.lost) - lost - _USUAL, 0.0)
        self._move(share, lost - later, coarser=is_first)

    def mend(self, made: Finished) -> None:
        """Go on at the step at which a code that falls short would not."""
        assert self.code.share is not None
        assert made.lost is not None
        self.work.compare(made.lost.worst)
        self._move(self.code.share, _octaves(made.lost.worst), coarser=False)

    def _move(self, share: ForShare, end: float, *, coarser: bool) -> None:
        """Go on at the step where it loses what it should, if it loses 2^end at this one."""
        assert self.work.wanted is not None
        move = _eighths(math.log2(self.work.wanted) - end, _REFINED_POWER, _MOST_MOVED)
        if move <= -_LEAST_FINER:
            self.work.relaxed = self._moved(share, move)
        elif coarser:
            most = _MOST_WORSE * max(share.lost, self.work.wanted)
            tried = (self._moved(share, by) for by in range(move, _LEAST_COARSER - 1, -1))
            self.work.relaxed = next((one for one in tried if self._lost_of_few(one) <= most), self.work.relaxed)

    def _moved(self, share: ForShare, move: int) -> RelaxedCode:
        moved = self.code.relaxed(share.steps.with_slots(self.work.relaxed.step + move, share.slots))
        # Codes of text keep no more of the gain so (docs/results/LOG.md, 2026-12-02).
        moved.go_on_from(self.work.relaxed, anew=move < 0 and self._has_short_answers)
        return moved

    @property
    def _has_short_answers(self) -> bool:
        return has_short_answers(self.work.teacher, self.code.refiner.config)

    def _lost_of_few(self, relaxed: RelaxedCode) -> float:
        return self.code.refiner.lost(self.code.codec, relaxed.to_code(), of_few=True).of_most


def _octaves(share: float) -> float:
    """Return the logarithm, base 2, of a share that is lost."""
    return math.log2(max(share, LEAST_LOST))


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
