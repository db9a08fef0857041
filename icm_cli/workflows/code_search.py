"""Look for the smallest code of one adapter that keeps what is asked for.

    tolerance ladder:  0.5 ── 0.35 ── 0.25 ── ... ── 0.004      coarse to fine
                               └── halving: encode, refine, load by PEFT, measure ──▶ coarsest that keeps the gain

The gain is measured on the task's held-out text, and is therefore a little flattered by having been chosen; what
`icm eval --data` says on other text is not.
"""

from __future__ import annotations

import tempfile
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from icm_cli.workflows.encode_plan import EncodeRequest
from icm_cli.workflows.events import Event, Step, StopFlag
from icm_cli.workflows.task_evaluation import RungResult, TaskEvaluation, result_of
from icmlora.adapter import Adapter
from icmlora.base_model import BaseModel
from icmlora.errors import DataError
from icmlora.generator.codec import Codec
from icmlora.generator.relaxed import RelaxedCode
from icmlora.generator.step_search import Encoded
from icmlora.peft_folder import save_adapter
from icmlora.refinement import RefineConfig, refine
from registry.records import NewEvaluation

_LADDER = tuple(0.5 * 2 ** (-rung / 2) for rung in range(15))
"""Weighted errors from 0.5 to 0.004, half an octave apart: each rung takes a tenth to a fifth more bytes."""


@dataclass(frozen=True)
class Refiner:
    """What refining a code takes."""

    base: BaseModel
    texts: Sequence[str]
    config: RefineConfig


@dataclass(frozen=True)
class Candidate:
    """A code with what was measured of it.

    Attributes:
        encoded: The code.
        result: Its loss and gain; None where no gain is asked for.
    """

    encoded: Encoded
    result: RungResult | None

    @property
    def gain(self) -> float | None:
        """Its retained gain, if it was measured and there is one."""
        return None if self.result is None else self.result.retained_gain


class CodeSearch:
    """Encodes one adapter in several ways.

    Args:
        codec: The generator's.
        original: The adapter.
        vectors: The task's vectors by view.
        evaluation: Measures gains; None where none is asked for.
        refiner: Refines codes; None for no refinement.
    """

    def __init__(
        self,
        codec: Codec,
        original: Adapter,
        vectors: Mapping[str, torch.Tensor],
        evaluation: TaskEvaluation | None,
        refiner: Refiner | None,
    ) -> None:
        self._codec, self._original, self._vectors = codec, original, vectors
        self._evaluation, self._refiner = evaluation, refiner

    def run(self, request: EncodeRequest, stop: StopFlag) -> Generator[Event, None, tuple[Candidate, bool] | None]:
        """Return the smallest code found and whether it keeps the limits; if none does, the most faithful one.

        None where the user stopped.

        Raises:
            DataError: There is no gain to keep, or no code at all.
        """
        if request.min_gain is None:
            tried = yield from self._candidate(request.tolerance, request.max_error, stop)
            return None if tried is None else (tried, True)
        low, high, best = 0, len(_LADDER) - 1, None
        while low <= high:
            middle = (low + high) // 2
            tried = yield from self._candidate(_LADDER[middle], request.max_error, stop)
            if tried is None:
                return None
            if tried.gain is None:
                raise DataError("its original does not help on its held-out text, so there is no gain to keep")
            if tried.gain >= request.min_gain:
                best, high = tried, middle - 1
            else:
                low, finest = middle + 1, tried
        return (finest, False) if best is None else (best, True)

    def evaluations(self, candidate: Candidate) -> Sequence[NewEvaluation]:
        """Return what is to be recorded of a candidate."""
        if self._evaluation is None or candidate.result is None:
            return ()
        return (self._evaluation.evaluation_of(candidate.result),)

    def _candidate(
        self, tolerance: float | None, max_error: float | None, stop: StopFlag
    ) -> Generator[Event, None, Candidate | None]:
        encoded = self._codec.encode(self._original, self._vectors, tolerance=tolerance, max_error=max_error)
        if self._refiner is not None:
            refined = yield from self._refined(self._refiner, encoded, stop)
            if refined is None:
                return None
            encoded = refined
        return Candidate(encoded, None if self._evaluation is None else self._measured(self._evaluation, encoded))

    def _refined(self, refiner: Refiner, encoded: Encoded, stop: StopFlag) -> Generator[Event, None, Encoded | None]:
        relaxed = RelaxedCode(self._codec, self._original, encoded.data)
        error = encoded.weighted_error
        for step in refine(relaxed, error, refiner.base, self._original, refiner.texts, refiner.config):
            yield Step(step, refiner.config.steps)
            if stop.requested:
                return None
        return self._codec.measure(self._original, relaxed.to_code())

    def _measured(self, evaluation: TaskEvaluation, encoded: Encoded) -> RungResult:
        known = evaluation.run((), again=False)
        with tempfile.TemporaryDirectory(prefix="icm-") as folder:
            written = Path(folder) / "adapter"
            save_adapter(self._codec.decode(encoded.data), written, dtype="bfloat16", card="", metadata={})
            loss = evaluation.loss_of("code", written)
        return result_of("code", loss, encoded.dw_error, known)
