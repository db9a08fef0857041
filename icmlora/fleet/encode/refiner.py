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
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import pairwise, product
from typing import Any

from icmlora.adapter.model import Adapter
from icmlora.base_models.modality import BaseModel
from icmlora.base_models.running.lora_hooks import factors_of
from icmlora.fleet.resources.workers import OnProgress
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


@dataclass(frozen=True)
class Share:
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
class TrialCode:
    """A code of one adapter, before or after refinement."""

    refiner: Refiner
    codec: Codec
    original: Adapter
    encoded: Encoded
    share: Share | None = None  # None for the code of a generated adapter
    lost: EffectLoss | None = None  # of the adapter's effect; None if not measured

    @property
    def misses_limit(self) -> bool:
        """Whether it loses more of the effect than is allowed."""
        return self.share is not None and self.lost is not None and self.lost.counted > self.share.most

    def measured(self) -> TrialCode:
        """Return it with its loss, if it has to keep a share."""
        return self if self.share is None else replace(self, lost=self.refiner.lost(self.codec, self.encoded.data))

    def relaxed(self, data: bytes) -> RelaxedCode:
        """Return its adapter's code of these bytes, to be changed."""
        return RelaxedCode(self.codec, self.original, data, self.refiner.base.device)


def lost_before(keep: float, beyond: float) -> float:
    """Return the share of the effect that a code should lose before it is refined; `beyond` is the effect's."""
    share = min(_COARSER * (1 - keep), 1 - keep / 2)  # halfway to a code that keeps nothing, at most
    return share * math.sqrt(beyond)  # the form of answers, which counts little, comes back in few steps


def coarse_for(
    keep: float, lost: float, refiner: Refiner, codec: Codec, original: Adapter, steps: AdapterSteps
) -> TrialCode:
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
    return TrialCode(refiner, codec, original, encoded, Share(keep, steps, found, slots))


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


def refine_all(codes: Sequence[TrialCode], on_progress: OnProgress) -> list[TrialCode]:
    """Refine codes side by side: all on the same base model, and for the same number of steps.

    A code that misses its share repeats its last steps at a finer quantisation step; the better one is taken.
    """
    base, config = codes[0].refiner.base, codes[0].refiner.config
    running = list(map(_Refinement, codes))
    looks = _LOOKS if any(code.share is not None for code in codes) else ()
    note = "refining"

    def go(which: Sequence[_Refinement], first: float, last: float) -> None:
        nonlocal note
        steps = range(round(first * config.steps), round(last * config.steps))
        for step in refine([one.work for one in which], base, config, steps):
            note = f"refining, step {step} of {config.steps}"
            on_progress(note)

    with stoppable(base, lambda: on_progress(note)):
        for number, (first, last) in enumerate(pairwise([0.0, *looks, 1.0])):
            go(running, first, last)
            if last < 1:
                for one in running:
                    one.predict_final_loss(number)
        refined = [one.code_now() for one in running]
        short = [number for number, code in enumerate(refined) if code.misses_limit]
        for number in short:
            running[number].retry_finer(refined[number])
        go([running[number] for number in short], _LOOKS[-1], 1.0)
        for number in short:
            refined[number] = min(refined[number], running[number].code_now(), key=_counted)
    return refined


def _counted(code: TrialCode) -> float:
    assert code.lost is not None
    return code.lost.counted


class _Refinement:
    """The refinement of one code."""

    def __init__(self, code: TrialCode) -> None:
        refiner, aim = code.refiner, None if code.share is None else code.share.aim
        relaxed = code.relaxed(code.encoded.data)
        self._code = code
        self.work = Refinable(relaxed, code.encoded.weighted_error, refiner.teacher, refiner.effect, aim)
        self._has_short_answers = has_short_answers(refiner.teacher, refiner.config)

    def code_now(self) -> TrialCode:
        """Return the code as it is now, with its loss."""
        code = self._code
        return replace(code, encoded=measured(code.codec, code.original, self.work.relaxed.to_code())).measured()

    def predict_final_loss(self, number: int) -> None:
        """Re-quantise at the step from which the remaining steps are predicted to end at the aim."""
        share = self._code.share
        if share is None:
            return
        found = self._lost(self.work.relaxed)
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

    def retry_finer(self, missed: TrialCode) -> None:
        """Re-quantise at a finer step after the share was missed."""
        assert missed.share is not None
        assert missed.lost is not None
        self.work.compare(missed.lost.worst)
        self._move(missed.share, _octaves(missed.lost.worst), coarser=False)

    def _move(self, share: Share, end: float, *, coarser: bool) -> None:
        """Re-quantise at the step predicted to reach the aim, if the loss at the present one ends at 2^end."""
        assert self.work.wanted is not None
        move = _eighths(math.log2(self.work.wanted) - end, _REFINED_POWER, _MAX_MOVED)
        if move <= -_MIN_FINER:
            self.work.relaxed = self._moved(share, move)
        elif coarser:
            most = _MAX_WORSE * max(share.lost, self.work.wanted)
            tried = (self._moved(share, by) for by in range(move, _MIN_COARSER - 1, -1))
            fine_enough = (one for one in tried if self._lost(one, of_few=True).of_most <= most)
            self.work.relaxed = next(fine_enough, self.work.relaxed)

    def _moved(self, share: Share, move: int) -> RelaxedCode:
        moved = self._code.relaxed(share.steps.with_slots(self.work.relaxed.step + move, share.slots))
        # Codes of text keep no more of the gain so (docs/results/LOG.md, 2026-12-02).
        moved.continue_from(self.work.relaxed, reset_zeros=move < 0 and self._has_short_answers)
        return moved

    def _lost(self, relaxed: RelaxedCode, *, of_few: bool = False) -> EffectLoss:
        return self._code.refiner.lost(self._code.codec, relaxed.to_code(), of_few=of_few)


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
