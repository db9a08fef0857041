"""Look for the smallest code of one adapter that keeps what is asked for: see :mod:`icm_cli.workflows.gain_search`."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from icm_cli.workflows.encode_plan import EncodeRequest
from icm_cli.workflows.events import Event, Step, StopFlag
from icm_cli.workflows.gain_search import LADDER, Candidate, coarsest_kept, evaluations_of, measure, nearest_kept
from icm_cli.workflows.task_evaluation import TaskEvaluation
from icmlora.adapter import Adapter
from icmlora.base_model import BaseModel
from icmlora.generator.codec import Codec
from icmlora.generator.relaxed import RelaxedCode
from icmlora.generator.step_search import Encoded
from icmlora.initial_a import InitialA
from icmlora.refinement import RefineConfig, refine
from registry.records import NewEvaluation

_WON_BACK = 1.5
"""A refined code loses about this much less than the code that it started from: where to look for it."""


@dataclass(frozen=True)
class Refiner:
    """What refining a code takes."""

    base: BaseModel
    texts: Sequence[str]
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
    for step in refine(relaxed, encoded.weighted_error, refiner.base, adapter, refiner.texts, refiner.config):
        yield Step(step, refiner.config.steps, "refining its code")
        if stop.requested:
            return None
    return codec.measure(adapter, relaxed.to_code())
