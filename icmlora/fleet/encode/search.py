"""Search for the smallest code of one adapter that meets the limits, or the best one of a size.

    keep       step ──a few passes through the base model──▶ step that keeps less than asked ──refine──▶ code

    gain       tolerance  0.95   0.71   0.5   0.35   ...   0.004
                          few bytes                   many bytes
                            └─ bisection: encode, load with PEFT, measure ──▶ the coarsest that keeps it

The tolerance is chosen by the gain on the task's held-out text, which makes that gain slightly optimistic. `icm eval
--data` with other text is the stricter test.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch

from icmlora.adapter.model import Adapter
from icmlora.errors import DataError
from icmlora.fleet.encode.refiner import Coarse, Finished, Refiner, coarse_for, lost_before, refine_all
from icmlora.fleet.measure.measure import SourceResult, TaskLosses
from icmlora.fleet.resources.workers import Tell
from icmlora.generator.codec import Codec
from icmlora.generator.encoding import Encoded, Steps, encode_adapter
from icmlora.generator.initial_a.draw import InitialA
from icmlora.generator.limits import Limits
from icmlora.io.text import human_size

LADDER = (0.95, *(2 ** (-half / 2) for half in range(1, 17)))
"""Tolerances from 0.95 to 0.004, half an octave apart; each takes a tenth to a fifth more bytes than the one before.

At the coarsest, the code of a task that the generator predicts well holds no integers: it is the prediction itself.
"""

_LOSS_RATIO = 1.5
"""Refinement divides the lost gain of a code by about this; the first tolerance follows from it."""
_SURELY = 0.8
"""Share of the allowed loss that a code without refinement aims at: the search is this precise."""


@dataclass(frozen=True)
class Trial:
    """A code with its measurements."""

    encoded: Encoded
    result: SourceResult | None = None  # its loss and gain; None where no gain is asked for
    effect: float | None = None  # share of the adapter's effect that it keeps; None if not measured

    @property
    def gain(self) -> float | None:
        """Its retained gain, if it was measured and there is one."""
        return None if self.result is None else self.result.retained_gain

    def keeps(self, min_gain: float) -> bool:
        """Return whether its retained gain is at least `min_gain`; raises `DataError` where there is none to keep."""
        if self.gain is None:
            fact = "its original is no better than the base model on its held-out text, so there is no gain to keep"
            raise DataError(fact)
        return self.gain >= min_gain


@dataclass(frozen=True)
class LadderResult:
    """The result of a search along a ladder: the index, its trial, and whether that keeps the gain."""

    index: int
    trial: Trial
    is_kept: bool


Attempt = Callable[[int], Trial]
"""Makes and measures the code of one index of a ladder."""


def bisect(length: int, min_gain: float, attempt: Attempt) -> LadderResult:
    """Bisect a ladder for its coarsest entry that keeps a gain; if none does, return the finest."""
    low, high = 0, length - 1
    best: LadderResult | None = None
    while low <= high:
        middle = (low + high) // 2
        trial = attempt(middle)
        is_kept = trial.keeps(min_gain)
        if is_kept or best is None or not best.is_kept:
            best = LadderResult(middle, trial, is_kept)
        if is_kept:
            high = middle - 1
        else:
            low = middle + 1
    assert best is not None
    return best


def walk(first: int, length: int, min_gain: float, attempt: Attempt) -> LadderResult:
    """Try coarser entries of a ladder while they keep a gain, or finer ones until one does."""
    # A good first guess takes two attempts, where bisection takes four.
    trial = attempt(first)
    found = LadderResult(first, trial, trial.keeps(min_gain))
    for index in range(first - 1, -1, -1) if found.is_kept else range(first + 1, length):
        trial = attempt(index)
        if trial.keeps(min_gain) != found.is_kept:
            return found if found.is_kept else LadderResult(index, trial, True)
        found = LadderResult(index, trial, found.is_kept)
    return found


def ladder_within(tolerance: float | None) -> tuple[float, ...]:
    """Return the tolerances to try: the given one, then the finer entries of the ladder."""
    if tolerance is None:
        return LADDER
    return tolerance, *(finer for finer in LADDER if finer < tolerance)


@dataclass(frozen=True)
class CodeSearch:
    """Encodes one adapter in several ways."""

    codec: Codec
    original: Adapter
    vectors: Mapping[str, torch.Tensor]  # view -> mean over the support sets, float32 of shape (hidden,)
    initial: InitialA | None
    limits: Limits
    losses: TaskLosses | None  # measures gains; None where no gain is asked for
    refiner: Refiner | None
    tell: Tell

    @property
    def is_refined_once(self) -> bool:
        """Whether the code is made once and refined, so that other codes can be refined with it."""
        limits = self.limits
        return self.refiner is not None and bool(limits.refine) and limits.min_gain is None and limits.size is None

    def best(self) -> tuple[Trial, bool]:
        """Return the smallest code found that meets the limits, or the most accurate one of a size.

        Returns:
            The code, and whether it meets all limits. If none does, it is the most accurate one; if none is as small
            as the size, the smallest.
        """
        limits, min_gain = self.limits, self.limits.min_gain
        if limits.keep is not None:
            coarse = self.coarse()
            (made,) = refine_all([coarse], self.tell) if limits.refine else [Finished.of(coarse, coarse.encoded)]
            return self.done(made)
        if limits.size is not None:
            return self._most_accurate(limits.size)
        if min_gain is None:
            return self._try(limits, self.refiner), True
        ladder = ladder_within(limits.tolerance)

        def attempt(index: int, refiner: Refiner | None = None) -> Trial:
            return self._try(replace(limits, tolerance=ladder[index]), refiner)

        if self.refiner is None:
            found = bisect(len(ladder), min_gain, attempt)
        else:  # refinement takes minutes, so find out without it where to begin
            near = bisect(len(ladder), 1 - _LOSS_RATIO * (1 - min_gain), attempt)
            found = walk(near.index, len(ladder), min_gain, partial(attempt, refiner=self.refiner))
        return found.trial, found.is_kept

    def coarse(self) -> Coarse:
        """Return the code that refinement begins with."""
        assert self.refiner is not None
        keep = self.limits.keep
        if keep is None:
            return Coarse(self.refiner, self.codec, self.original, self._plain(self.limits))
        self.tell(f"encoding, to keep {keep:g}")
        steps = Steps(self.codec, self.original, self.vectors, self.initial)
        lost = lost_before(keep, self.refiner.effect.beyond) if self.limits.refine else _SURELY * (1 - keep)
        return coarse_for(keep, lost, self.refiner, self.codec, self.original, steps)

    def done(self, made: Finished) -> tuple[Trial, bool]:
        """Return a refined code, and whether it keeps its share."""
        return Trial(made.encoded, effect=None if made.lost is None else 1 - made.lost.counted), not made.misses_limit

    def _most_accurate(self, size: int) -> tuple[Trial, bool]:
        min_gain, encoded = self.limits.min_gain, self._plain(self.limits)
        trial = self._measured(encoded)
        is_good = self.limits.keeps(encoded) and (min_gain is None or trial.keeps(min_gain))
        return trial, is_good and len(encoded.data) <= size

    def _plain(self, limits: Limits) -> Encoded:
        if limits.size is not None:
            self.tell(f"encoding, at most {human_size(limits.size)}")
        else:
            self.tell("encoding" if limits.tolerance is None else f"encoding, tolerance {limits.tolerance:.2g}")
        return encode_adapter(self.codec, self.original, self.vectors, self.initial, limits)

    def _try(self, limits: Limits, refiner: Refiner | None) -> Trial:
        encoded = self._plain(limits)
        if refiner is not None:
            encoded = refiner.refine(self.codec, self.original, encoded, self.tell)
        return self._measured(encoded)

    def _measured(self, encoded: Encoded) -> Trial:
        """Measure the decoded adapter if a gain is asked for."""
        if self.losses is None:
            return Trial(encoded)
        decoded = self.codec.decode(encoded.data)
        return Trial(encoded, self.losses.measure_adapter("code", decoded, encoded.squared_error))
