"""What an encoding is asked for and what it reports.

What was made of an adapter with what was measured of it, and the search for the smallest that keeps a gain.

    tolerance ladder:  0.95 ── 0.71 ── 0.5 ── 0.35 ── ... ── 0.004      coarse to fine
                                        └── halving: make, load by PEFT, measure ──▶ coarsest that keeps the gain

The gain is measured on the task's held-out text, and is therefore a little flattered by having been chosen; what
`icm eval --data` says on other text is not.

Look for the smallest code of one adapter that keeps what is asked for: see :mod:`icm_cli.workflows.gain_search`.

Look for the smallest residual with which a task's present code keeps what is asked for.

code alone ──keeps it?──▶ nothing
    └── no ──▶ tolerances finer than the code's, halved as for codes ──▶ coarsest residual that keeps the gain
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from icmlora.adapter.model import Adapter
from icmlora.base_models.modality import BaseModel
from icmlora.errors import DataError
from icmlora.fleet.context import Event, Progress, StopFlag
from icmlora.fleet.measure import RungResult, TaskEvaluation
from icmlora.formats.peft import save_adapter
from icmlora.generator.codec import Codec
from icmlora.generator.encoding import Encoded, Limits
from icmlora.generator.initial_a.draw import InitialA
from icmlora.generator.relaxed import RelaxedCode
from icmlora.generator.residual_codec import ResidualCodec
from icmlora.training.refinement import RefineConfig, refine
from registry.errors import CodeChanged
from registry.records import Asked, NewEvaluation, Rung

EncodeStatus = Literal["encoded", "enough", "below", "known", "evicted", "unmeasured"]


@dataclass(frozen=True)
class EncodeRequest:
    """What a code has to keep; at least one limit is given.

    Attributes:
        names: Tasks; all if empty.
        max_error: Largest relative dW error.
        min_gain: Smallest retained gain; measuring it needs the base model and held-out text.
        tolerance: Largest relative error of dW weighted by sensitivity, which is what `--quality` of a training sets.
        residual: Leave the codes as they are, and put beside each what it lacks.
        refine: Steps of functional refinement, 0 for none; it needs the base model and samples.
        base_model: Only tasks of this one.
        device: Where gains are measured and codes refined.
        again: Also tasks whose present code was made for the very same.
    """

    names: Sequence[str]
    max_error: float | None
    min_gain: float | None
    device: str
    tolerance: float | None = None
    refine: int = 0
    base_model: str | None = None
    residual: bool = False
    again: bool = False

    def asked(self, *, is_kept: bool) -> Asked:
        """Return what is recorded of the limits."""
        return Asked(self.min_gain, self.max_error, self.tolerance, is_kept, self.refine)


@dataclass(frozen=True)
class TaskEncoded(Event):
    """What became of one task.

    Attributes:
        task: Its name.
        status: `encoded`: its code, or the residual beside it, is the smallest found that keeps the limits; `known`: it
            was that already; `enough`: its code needs no residual for that; `below`: nothing does, so it should keep
            its original (it has its best code, and no residual); `evicted`: only what is left of it stays;
            `unmeasured`: see `reason`.
        size: Bytes of its code.
        residual_size: Bytes of the residual beside it, if it has one.
        before: Bytes of the code and residual that it had, if any.
        dw_error: Relative dW error of what they decode to.
        retained_gain: Retained gain of that, if it was measured.
        reason: Why its gain could not be measured; its code is as it was.
    """

    task: str
    status: EncodeStatus
    size: int | None = None
    residual_size: int | None = None
    before: int | None = None
    dw_error: float | None = None
    retained_gain: float | None = None
    reason: str | None = None


@dataclass
class EncodeReport:
    """What an encoding did."""

    tasks: list[TaskEncoded] = field(default_factory=list)
    stopped: bool = False

    @property
    def short(self) -> list[TaskEncoded]:
        """The tasks that have no code which is known to keep the limits."""
        return [task for task in self.tasks if task.status in ("below", "unmeasured")]


LADDER = (0.95, *(2 ** (-rung / 2) for rung in range(1, 17)))
"""Weighted errors from 0.95 to 0.004, half an octave apart: each rung takes a tenth to a fifth more bytes.

On the coarsest, a task that the generator predicts well has a code without integers: the prediction, by itself.
"""


@dataclass(frozen=True)
class Candidate:
    """A code, or a residual beside one, with what was measured of it.

    Attributes:
        encoded: Its bytes.
        result: Its loss and gain; None where no gain is asked for.
    """

    encoded: Encoded
    result: RungResult | None

    @property
    def gain(self) -> float | None:
        """Its retained gain, if it was measured and there is one."""
        return None if self.result is None else self.result.retained_gain

    def keeps(self, min_gain: float) -> bool:
        """Say whether it keeps a gain.

        Raises:
            DataError: There is no gain to keep.
        """
        if self.gain is None:
            raise DataError("its original does not help on its held-out text, so there is no gain to keep")
        return self.gain >= min_gain


@dataclass(frozen=True)
class Found:
    """What a search along a ladder came to: the place, what is there, and whether it keeps the gain."""

    place: int
    candidate: Candidate
    keeps: bool


Attempt = Callable[[int], Generator[Event, None, Candidate | None]]
"""Makes and measures what is at one place of a ladder; None where the user stopped."""


def coarsest_kept(places: int, min_gain: float, attempt: Attempt) -> Generator[Event, None, Found | None]:
    """Halve a ladder for the coarsest place that keeps a gain; if none does, return the finest. None if stopped.

    Args:
        places: How many there are, coarse to fine; at least one.
        min_gain: The gain.
        attempt: Called with some of them.

    Raises:
        DataError: There is no gain to keep.
    """
    low, high, found = 0, places - 1, None
    while low <= high:
        middle = (low + high) // 2
        tried = yield from attempt(middle)
        if tried is None:
            return None
        if tried.keeps(min_gain):
            found, high = Found(middle, tried, True), middle - 1
        else:
            low = middle + 1
            if found is None:
                finest = Found(middle, tried, False)
    return finest if found is None else found


def nearest_kept(start: int, places: int, min_gain: float, attempt: Attempt) -> Generator[Event, None, Found | None]:
    """Go from one place of a ladder to coarser ones while the gain is kept, or to finer ones until it is.

    Where an attempt is dear and the place is nearly known, that is two of them; halving takes four.

    Args:
        start: Where to begin.
        places: How many there are, coarse to fine.
        min_gain: The gain.
        attempt: Called with some of them.

    Returns:
        The coarsest found that keeps the gain; if none does, the finest. None if the user stopped.

    Raises:
        DataError: There is no gain to keep.
    """
    first = yield from attempt(start)
    if first is None:
        return None
    found = Found(start, first, first.keeps(min_gain))
    for place in range(start - 1, -1, -1) if found.keeps else range(start + 1, places):
        tried = yield from attempt(place)
        if tried is None:
            return None
        if tried.keeps(min_gain) != found.keeps:
            return found if found.keeps else Found(place, tried, True)
        found = Found(place, tried, found.keeps)
    return found


def measure(evaluation: TaskEvaluation, rung: Rung, adapter: Adapter, error: float) -> RungResult:
    """Write an adapter as `icm materialize` does, load it by PEFT and measure it; nothing is recorded of it.

    Args:
        evaluation: Measures the task.
        rung: What the adapter will be, once it is stored.
        adapter: The adapter.
        error: Its relative dW error.
    """
    known = evaluation.run((), again=False)
    with tempfile.TemporaryDirectory(prefix="icm-") as folder:
        written = Path(folder) / "adapter"
        save_adapter(adapter, written, dtype="bfloat16", card="", metadata={})
        return evaluation.result_of(rung, evaluation.loss_of(rung, written), error, known)


def evaluations_of(evaluation: TaskEvaluation | None, candidate: Candidate | None) -> Sequence[NewEvaluation]:
    """Return what is to be recorded of a candidate."""
    if evaluation is None or candidate is None or candidate.result is None:
        return ()
    return (evaluation.evaluation_of(candidate.result),)


_WON_BACK = 1.5
"""A refined code loses about this much less than the code that it started from: where to look for it."""


@dataclass(frozen=True)
class Refiner:
    """What refining a code takes."""

    base: BaseModel
    samples: Sequence[Any]
    config: RefineConfig


class CodeSearch:
    """Encodes one adapter in several ways.

    Args:
        codec: The generator's.
        original: The adapter.
        vectors: The task's vectors by view.
        initial: Where the A that its training began with was drawn, if that is known.
        evaluation: Measures gains; None where none is asked for.
        refiner: Refines codes; None for no refinement.
    """

    def __init__(
        self,
        codec: Codec,
        original: Adapter,
        vectors: Mapping[str, torch.Tensor],
        initial: InitialA | None,
        evaluation: TaskEvaluation | None,
        refiner: Refiner | None,
    ) -> None:
        self._codec, self._original, self._vectors, self._initial = codec, original, vectors, initial
        self._evaluation, self._refiner = evaluation, refiner

    def run(self, request: EncodeRequest, stop: StopFlag) -> Generator[Event, None, tuple[Candidate, bool] | None]:
        """Return the smallest code found and whether it keeps the limits; if none does, the most faithful one.

        None where the user stopped.

        Raises:
            DataError: There is no gain to keep, or no code at all.
        """
        if request.min_gain is None:
            tried = yield from self._candidate(request.tolerance, request.max_error, stop, self._refiner)
            return None if tried is None else (tried, True)

        def attempt(refiner: Refiner | None, place: int) -> Generator[Event, None, Candidate | None]:
            return self._candidate(LADDER[place], request.max_error, stop, refiner)

        plain, gain = partial(attempt, None), request.min_gain
        if self._refiner is None:
            found = yield from coarsest_kept(len(LADDER), gain, plain)
        else:  # refining takes minutes, so where to begin is looked for without
            found = yield from coarsest_kept(len(LADDER), 1 - _WON_BACK * (1 - gain), plain)
            if found is not None:
                found = yield from nearest_kept(found.place, len(LADDER), gain, partial(attempt, self._refiner))
        return None if found is None else (found.candidate, found.keeps)

    def evaluations(self, candidate: Candidate) -> Sequence[NewEvaluation]:
        """Return what is to be recorded of a candidate."""
        return evaluations_of(self._evaluation, candidate)

    def _candidate(
        self, tolerance: float | None, max_error: float | None, stop: StopFlag, refiner: Refiner | None
    ) -> Generator[Event, None, Candidate | None]:
        if stop.requested:
            return None
        limits = {"tolerance": tolerance, "max_error": max_error}
        encoded = self._codec.encode(self._original, self._vectors, self._initial, **limits)
        if refiner is not None:
            better = yield from refined(self._codec, self._original, encoded, refiner, stop)
            if better is None:
                return None
            encoded = better
        if self._evaluation is None:
            return Candidate(encoded, None)
        decoded = self._codec.decode(encoded.data)
        return Candidate(encoded, measure(self._evaluation, "code", decoded, encoded.dw_error))


def refined(
    codec: Codec, adapter: Adapter, encoded: Encoded, refiner: Refiner, stop: StopFlag
) -> Generator[Event, None, Encoded | None]:
    """Return a code that does more of what the adapter does, or None where the user stopped."""
    relaxed = RelaxedCode(codec, adapter, encoded.data)
    for step in refine(relaxed, encoded.weighted_error, refiner.base, adapter, refiner.samples, refiner.config):
        yield Progress(step, refiner.config.steps, "refining its code")
        if stop.requested:
            return None
    return codec.measure(adapter, relaxed.to_code())


@dataclass(frozen=True)
class Beside:
    """What was found.

    Attributes:
        keeps: Whether the limits are kept.
        alone: The code, as it was measured now.
        residual: What it lacks to keep them; None where it lacks nothing, and where nothing is enough.
    """

    keeps: bool
    alone: Candidate
    residual: Candidate | None

    @property
    def best(self) -> Candidate:
        """What the task comes back as."""
        return self.alone if self.residual is None else self.residual


class ResidualSearch:
    """Makes residuals of one adapter and its code.

    Args:
        codec: The generator's.
        original: The adapter.
        code: Its code, as it is in the store.
        evaluation: Measures gains; None where none is asked for.
    """

    def __init__(self, codec: Codec, original: Adapter, code: bytes, evaluation: TaskEvaluation | None) -> None:
        self._codec, self._layered = codec, ResidualCodec(codec)
        self._original, self._code, self._evaluation = original, code, evaluation

    def run(self, request: EncodeRequest, stop: StopFlag) -> Generator[Event, None, Beside | None]:
        """Return the smallest residual found that keeps the limits; None where the user stopped.

        Raises:
            DataError: There is no gain to keep.
            GeneratorError: Float32 cannot keep the limits.
            CodeChanged: The code is gone: its task got another adapter meanwhile.
        """
        limits, gain, evaluation = Limits(request.tolerance, request.max_error), request.min_gain, self._evaluation
        encoded = self._codec.measure(self._original, self._code)
        if gain is None or evaluation is None:
            alone = Candidate(encoded, None)
            if limits.keeps(encoded):
                return Beside(True, alone, None)
            return Beside(True, alone, Candidate(self._layered.encode(self._original, self._code, limits), None))
        alone = Candidate(encoded, _measured(evaluation))
        if limits.keeps(encoded) and alone.keeps(gain):
            return Beside(True, alone, None)
        finer = [rung for rung in LADDER if rung < min(encoded.weighted_error, request.tolerance or 1.0)]

        def attempt(place: int) -> Generator[Event, None, Candidate | None]:
            yield from ()
            return None if stop.requested else self._candidate(Limits(finer[place], request.max_error), evaluation)

        if not finer:
            return Beside(False, alone, None)
        found = yield from coarsest_kept(len(finer), gain, attempt)
        if found is None:
            return None
        return Beside(found.keeps, alone, found.candidate if found.keeps else None)

    def _candidate(self, limits: Limits, evaluation: TaskEvaluation) -> Candidate:
        made = self._layered.encode(self._original, self._code, limits)
        decoded = self._layered.decode(self._code, made.data)
        return Candidate(made, measure(evaluation, "residual", decoded, made.dw_error))


def _measured(evaluation: TaskEvaluation) -> RungResult:
    """Measure the code, or return what is known of it."""
    results = evaluation.run(("code",), again=False)
    if "code" not in results:
        raise CodeChanged("the task got another adapter while its code was measured", hint="run the same command again")
    return results["code"]
