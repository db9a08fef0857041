"""Look for the smallest residual with which a task's present code keeps what is asked for.

code alone ──keeps it?──▶ nothing
    └── no ──▶ tolerances finer than the code's, halved as for codes ──▶ coarsest residual that keeps the gain
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

from icm_cli.workflows.encode_plan import EncodeRequest
from icm_cli.workflows.events import Event, StopFlag
from icm_cli.workflows.gain_search import LADDER, Candidate, coarsest_kept, measure
from icm_cli.workflows.task_evaluation import RungResult, TaskEvaluation
from icmlora.adapter import Adapter
from icmlora.generator.codec import Codec
from icmlora.generator.layered import LayeredCodec
from icmlora.generator.step_search import Limits
from registry.errors import CodeChanged


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
        self._codec, self._layered = codec, LayeredCodec(codec)
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
