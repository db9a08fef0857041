"""Search for the smallest code that preserves a given share of the adapter's effect.

    step ──few trials──▶ code that keeps less than asked ──a fifth of the steps──▶ measure ──another step──▶ the others
                                                                                                               │
                                     done ◀──the last steps again──finer step──◀── keeps too little ──◀── measure

The gain of refinement differs between adapters by a factor of four. The first steps predict it (docs/results/LOG.md),
so a code that would end too accurate or too coarse continues with coarser or finer values. One that misses its share at
the end continues with finer ones.
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
from icmlora.generator.codec.codec import Codec
from icmlora.generator.codec.encoding import Encoded, measured
from icmlora.generator.codec.relaxed import RelaxedCode
from icmlora.generator.codec.steps import AdapterSteps, SlotChoice
from icmlora.generator.scales import OCTAVE
from icmlora.training.effect import MIN_LOST, Effect, EffectLoss
from icmlora.training.refinement import Refinable, RefineConfig, has_short_answers, items_for, refine
from icmlora.training.teacher import Teacher

_COARSER = 3.5  # refinement begins with a code that loses this multiple of the allowed loss
_FIRST = 0.5  # squared error of the first code that is measured
_MAX_TRIALS = 4
_NEAR = 0.3  # octaves between a trial and the wanted share, at most
_STRIDE = 3 * OCTAVE  # eighths of an octave between two trials, at most
_SIZE_POWER = 0.9  # codes grow about as this power of 1 / loss (docs/results/LOG.md)
# The loss grows as a power of the step: of plain codes, and of refined ones.
_PLAIN_POWER, _REFINED_POWER = 2.0, 1.4
# Shares of the steps of refinement before each measurement; a code that misses its share repeats the last part.
_LOOKS = 0.2, 0.6
# Eighths of an octave by which the step changes then, or for a code that misses its share: at most, and at least if it
# gets finer or coarser. A coarser step undoes refinement, and the price of bits makes codes smaller too. Its loss may
# be this multiple of the loss before refinement, or of the wanted loss: at some step all slots of a code are faint.
_MAX_MOVED, _MIN_FINER, _MIN_COARSER, _MAX_WORSE = 6, 2, 4, 1.5
# Octaves by which the remaining steps divide the loss, after each measurement; more after the first one if the steps
# before it gained more than usual.
_LATER, _USUAL = (0.3, 0.1), 1.2
_LATER_OF_ANSWERS = 1.2  # after the first measurement, if answers are short
# A code may lose half more than asked, and at most this much more: the variance between texts is larger.
_SHORT, _MAX_SHORT = 1 / 2, 0.01
_AIM = 0.6  # of the way from the asked loss to the largest allowed one


@dataclass(frozen=True)
class Refiner:
    """Measures and refines the effect of the codes of one adapter."""

    base: BaseModel  # in a precision for gradients
    teacher: Teacher  # on the texts that refinement reads
    effect: Effect  # of the adapter on other texts
    config: RefineConfig

    @classmethod
    def of(cls, base: BaseModel, adapter: Adapter, samples: Sequence[Any], config: RefineConfig) -> Refiner:
        """Prepare to refine the codes of one adapter; raises as `items_for` does."""
        read, held = items_for(base, adapter, samples, config)
        original = factors_of(adapter)
        teacher = Teacher(base, original, read)
        return cls(base, teacher, Effect(teacher if held is read else Teacher(base, original, held)), config)

    def lost(self, codec: Codec, data: bytes, *, of_few: bool = False) -> EffectLoss:
        """Return the share of the adapter's effect that the bytes of a code lose, as `Effect.lost`."""
        return self.effect.lost(factors_of(codec.decode(data)), of_few=of_few)

    def refine(self, codec: Codec, adapter: Adapter, encoded: Encoded, tell: Tell) -> Encoded:
        """Return a code whose adapter acts more like the original on the samples."""
        return refine_all([Coarse(self, codec, adapter, encoded)], tell)[0].encoded


@dataclass(frozen=True)
class ForShare:
    """The share of the effect that a code must keep, and the other codes that it may become."""

    keep: float
    steps: AdapterSteps
    lost: float  # by the code before refinement
    slots: SlotChoice

    @property
    def most(self) -> float:
        """The largest loss that is allowed."""
        return 1 - self.keep + min(_SHORT * (1 - self.keep), _MAX_SHORT)

    @property
    def aim(self) -> float:
        """The loss to aim at, so that nearly all codes lose less than `most`."""
        asked = 1 - self.keep
        return max(asked + _AIM * (self.most - asked), MIN_LOST)


@dataclass(frozen=True)
class Coarse:
    """A code that is to be refined."""

    refiner: Refiner
    codec: Codec
    original: Adapter
    encoded: Encoded
    share: ForShare | None = None  # None for the code of a generated adapter

    def relaxed(self, data: bytes) -> RelaxedCode:
        """Return its adapter's code of these bytes, to be changed."""
        return RelaxedCode(self.codec, self.original, data, self.refiner.base.device)


@dataclass(frozen=True)
class Finished:
    """A code that was refined, or left as it was, and its loss of the adapter's effect."""

    encoded: Encoded
    lost: EffectLoss | None  # None without a share to keep
    misses_limit: bool

    @property
    def effect(self) -> float | None:
        """The share of the adapter's effect that it keeps; None if not measured."""
        return None if self.lost is None else 1 - self.lost.counted

    @classmethod
    def of(cls, code: Coarse, encoded: Encoded) -> Finished:
        """Measure a code that was refined."""
        if code.share is None:
            return cls(encoded, None, misses_limit=False)
        lost = code.refiner.lost(code.codec, encoded.data)
        return cls(encoded, lost, misses_limit=lost.counted > code.share.most)

    def better(self, other: Finished) -> Finished:
        """Return the code that loses less."""
        assert self.lost is not None
        assert other.lost is not None
        return other if other.lost.counted < self.lost.counted else self


def lost_before(keep: float, beyond: float) -> float:
    """Return the share of the effect that a code should lose before it is refined; `beyond` is the effect's."""
    share = min(_COARSER * (1 - keep), 1 - keep / 2)  # halfway to a code that keeps nothing, at most
    return share * math.sqrt(beyond)  # the form of answers, which counts little, comes back in few steps


def coarse_for(
    keep: float, lost: float, refiner: Refiner, codec: Codec, original: Adapter, steps: AdapterSteps
) -> Coarse:
    """Return the plain code that loses about a share of its adapter's effect, to be refined until it keeps another.

    Of codes with and without faint slots, of either strengths, it would be the smallest if all had the same loss.
    """
    code = cache(steps.with_slots)

    @cache
    def lost_by(step: int, *, slots: SlotChoice) -> float:
        return refiner.lost(codec, code(step, slots), of_few=True).of_most

    def cost(slots: SlotChoice) -> float:
        return len(code(step, slots)) * math.pow(max(lost_by(step, slots=slots), MIN_LOST), _SIZE_POWER)

    choices = [SlotChoice(*which) for which in product((False, True), repeat=2)]
    step, _ = near(lost, partial(lost_by, slots=choices[0]), steps.expected(_FIRST))
    slots = min(choices, key=cost)
    step, found = near(lost, partial(lost_by, slots=slots), step)
    encoded = measured(codec, original, code(step, slots))
    return Coarse(refiner, codec, original, encoded, ForShare(keep, steps, found, slots))


def near(share: float, lost: Callable[[int], float], first: int) -> tuple[int, float]:
    """Return the step, log2 in eighths, with a code that loses nearly a share, and its loss, after a few trials.

    Between two steps the loss grows as a power of the step; beyond them it grows at the usual rate.
    """
    wanted, step, found = _octaves(share), first, dict[int, float]()
    while step not in found and len(found) < _MAX_TRIALS:
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

    A code that misses its share repeats its last steps at a finer quantisation step; the better one is taken.
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
                    one.predict_final_loss(number)
        finished = [one.finished() for one in running]
        short = [number for number, made in enumerate(finished) if made.misses_limit]
        for number in short:
            running[number].retry_finer(finished[number])
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
        """Return a code before its first step."""
        aim = None if code.share is None else code.share.aim
        relaxed, refiner = code.relaxed(code.encoded.data), code.refiner
        return cls(code, Refinable(relaxed, code.encoded.weighted_error, refiner.teacher, refiner.effect, aim))

    def finished(self) -> Finished:
        """Return the code as it is now."""
        return Finished.of(self.code, measured(self.code.codec, self.code.original, self.work.relaxed.to_code()))

    def predict_final_loss(self, number: int) -> None:
        """Re-quantise at the step from which the remaining steps are predicted to end at the aim."""
        share = self.code.share
        if share is None:
            return
        found = self.code.refiner.lost(self.code.codec, self.work.relaxed.to_code())
        self.work.compare(found.worst)
        lost = _octaves(found.of_most)
        is_first, later = number == 0, _LATER[number]
        if self._has_short_answers:
            if not is_first:  # a few predictions measure little, and the last steps gain far more than on text
                return
            later = _LATER_OF_ANSWERS
        if is_first:
            later += max(math.log2(share.lost) - lost - _USUAL, 0.0)
        self._move(share, lost - later, coarser=is_first)

    def retry_finer(self, made: Finished) -> None:
        """Re-quantise at a finer step after the share was missed."""
        assert self.code.share is not None
        assert made.lost is not None
        self.work.compare(made.lost.worst)
        self._move(self.code.share, _octaves(made.lost.worst), coarser=False)

    def _move(self, share: ForShare, end: float, *, coarser: bool) -> None:
        """Re-quantise at the step predicted to reach the aim, if the loss at the present one ends at 2^end."""
        assert self.work.wanted is not None
        move = _eighths(math.log2(self.work.wanted) - end, _REFINED_POWER, _MAX_MOVED)
        if move <= -_MIN_FINER:
            self.work.relaxed = self._moved(share, move)
        elif coarser:
            most = _MAX_WORSE * max(share.lost, self.work.wanted)
            tried = (self._moved(share, by) for by in range(move, _MIN_COARSER - 1, -1))
            self.work.relaxed = next((one for one in tried if self._lost_of_few(one) <= most), self.work.relaxed)

    def _moved(self, share: ForShare, move: int) -> RelaxedCode:
        moved = self.code.relaxed(share.steps.with_slots(self.work.relaxed.step + move, share.slots))
        # Codes of text keep no more of the gain so (docs/results/LOG.md, 2026-12-02).
        moved.continue_from(self.work.relaxed, reset_zeros=move < 0 and self._has_short_answers)
        return moved

    @property
    def _has_short_answers(self) -> bool:
        return has_short_answers(self.work.teacher, self.code.refiner.config)

    def _lost_of_few(self, relaxed: RelaxedCode) -> float:
        return self.code.refiner.lost(self.code.codec, relaxed.to_code(), of_few=True).of_most


def _octaves(share: float) -> float:
    """Return the logarithm, base 2, of a loss."""
    return math.log2(max(share, MIN_LOST))


def _eighths(octaves: float, power: float, most: int) -> int:
    """Return by how many eighths of an octave the step grows if the loss grows by some octaves."""
    return round(min(max(OCTAVE * octaves / power, -most), most))


@contextmanager
def stoppable(base: BaseModel, look: Callable[[], None]) -> Iterator[None]:
    """Call a function that may stop the work before each pass through a base model: there are hundreds of passes."""
    passes = base.model.register_forward_pre_hook(lambda *_: look())
    try:
        yield
    finally:
        passes.remove()
