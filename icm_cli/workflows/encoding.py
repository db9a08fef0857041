"""Give every task the smallest code that keeps what is asked for, under the present generator.

    tolerance ladder:  0.5 ── 0.35 ── 0.25 ── ... ── 0.004      coarse to fine
                               └── halving: encode, write, load by PEFT, measure ──▶ coarsest that keeps the limits

Nothing is trained. The retained gain is measured on the task's held-out text, and is therefore a little flattered by
having been chosen; what `icm eval --data` says on other text is not.
"""

from __future__ import annotations

import tempfile
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from icm_cli.workflows.base_access import open_base
from icm_cli.workflows.encode_plan import EncodeReport, EncodeRequest, EncodeStatus, TaskEncoded
from icm_cli.workflows.events import Event, Step, StopFlag
from icm_cli.workflows.opening import Place
from icm_cli.workflows.plain_copy import read_original
from icm_cli.workflows.store_fleet import mean_vectors
from icm_cli.workflows.task_evaluation import RungResult, TaskEvaluation
from icmlora.adapter import Adapter
from icmlora.base_model import BaseModel
from icmlora.device import resolve_device
from icmlora.errors import DataError, GeneratorError, IcmLoraError
from icmlora.evaluation import retained_gain
from icmlora.examples import EvaluationData
from icmlora.generator.codec import Codec, Encoded
from icmlora.generator.generator_file import generator_from_bytes
from icmlora.peft_folder import save_adapter
from registry.records import GeneratorRecord, NewCode, NewEvaluation, TaskRecord

if TYPE_CHECKING:
    import torch

    from registry.store import Store

_MAX_TOKENS = 256  # of each text, as `icm eval` measures by default
_LADDER = tuple(0.5 * 2 ** (-rung / 2) for rung in range(15))
"""Weighted errors from 0.5 to 0.004, half an octave apart: each rung takes a tenth to a fifth more bytes."""


def encode(place: Place, request: EncodeRequest, stop: StopFlag) -> Generator[Event, None, EncodeReport]:
    """Encode tasks anew; each new code is recorded at once, in the place of the present one.

    Raises:
        TaskNotFound: A name is not in the store.
        DataError: There is no generator.
        BaseModelNotFound: A gain is asked for and the base model is not on this machine.
        DeviceUnavailable: The device is not there.
    """
    report = EncodeReport()
    with place.open() as store:
        tasks = _tasks(store, request)
        work = _Work(store, request)
        yield Step(0, len(tasks))
        for task in tasks:
            if stop.requested:
                report.stopped = True
                break
            done = work.one(task)
            report.tasks.append(done)
            yield done
            yield Step(len(report.tasks), len(tasks), task.name)
    return report


def _tasks(store: Store, request: EncodeRequest) -> list[TaskRecord]:
    tasks = [store.task(name) for name in request.names] or list(store.tasks())
    chosen = {task.name: task for task in tasks if request.base_model in (None, task.base_model)}
    return sorted(chosen.values(), key=lambda task: (task.base_model, task.name))


@dataclass(frozen=True)
class _Candidate:
    """A code with what was measured of it."""

    encoded: Encoded
    result: RungResult | None
    """None where no gain is asked for."""

    @property
    def gain(self) -> float | None:
        return None if self.result is None else self.result.retained_gain


class _Work:
    """Encodes one task after the other; the latest generator and base model are kept, adapters are not."""

    def __init__(self, store: Store, request: EncodeRequest) -> None:
        self._store, self._request = store, request
        self._device = resolve_device(request.device)
        self._codec: Codec | None = None
        self._base: BaseModel | None = None

    def one(self, task: TaskRecord) -> TaskEncoded:
        """Encode one task and record its code."""
        generator = self._store.current_generator(task.base_model)
        if generator is None:
            raise DataError(f"there is no generator for task {task.name!r}", hint="`icm train` makes it")
        present, final = self._store.code(task.name, generator.id), self._store.final_adapter(task.name)
        before = None if present is None else present.size
        if final.is_evicted:
            error = None if present is None else present.dw_error
            return TaskEncoded(task.name, "evicted", before, before, error)
        try:
            search = _Search(self._codec_of(generator), read_original(self._store, final), *self._inputs(task))
            best, keeps = search.run(self._request.max_error, self._request.min_gain)
        except IcmLoraError as error:
            return TaskEncoded(task.name, "unmeasured", before, before, reason=str(error))
        data = best.encoded.data
        code = NewCode(task.name, final.id, self._store.put_blob(data), 8.0 * len(data), best.encoded.dw_error)
        self._store.replace_code(generator.id, code, search.evaluations(best))
        status: EncodeStatus = "encoded" if keeps else "below"
        return TaskEncoded(task.name, status, len(data), before, best.encoded.dw_error, best.gain)

    def _codec_of(self, generator: GeneratorRecord) -> Codec:
        if self._codec is None or self._codec.generator.digest != generator.blob:
            self._codec = Codec(generator_from_bytes(self._store.read_blob(generator.blob)))
        return self._codec

    def _inputs(self, task: TaskRecord) -> tuple[dict[str, torch.Tensor], TaskEvaluation | None]:
        vectors = mean_vectors(self._store, self._store.vectors(task.name))
        if self._request.min_gain is None:
            return vectors, None
        if task.eval_data is None:
            raise DataError("it has no held-out text, so its retained gain cannot be measured")
        if self._base is None or self._base.label != task.base_model:
            self._base = None
            self._base = open_base(self._store, task.base_model, self._device)
        data = EvaluationData.parse(self._store.read_blob(task.eval_data), path=task.name)
        return vectors, TaskEvaluation(self._store, self._base, task, data, _MAX_TOKENS)


class _Search:
    """Looks for the smallest code of one adapter that keeps the limits.

    Args:
        codec: The generator's.
        original: The adapter.
        vectors: The task's vectors by view.
        evaluation: Measures the gain; None where no gain is asked for.
    """

    def __init__(
        self, codec: Codec, original: Adapter, vectors: dict[str, torch.Tensor], evaluation: TaskEvaluation | None
    ) -> None:
        self._codec, self._original, self._vectors, self._evaluation = codec, original, vectors, evaluation

    def run(self, max_error: float | None, min_gain: float | None) -> tuple[_Candidate, bool]:
        """Return the smallest code found, and whether it keeps the limits; if none does, the most faithful one."""
        if min_gain is None:
            encoded = self._codec.encode(self._original, self._vectors, max_error=max_error)
            return _Candidate(encoded, None), True
        low, high, best = 0, len(_LADDER) - 1, None
        while low <= high:
            middle = (low + high) // 2
            tried = self._at(_LADDER[middle], max_error)
            if tried.gain is None:
                raise DataError("its original does not help on its held-out text, so there is no gain to keep")
            if tried.gain >= min_gain:
                best, high = tried, middle - 1
            else:
                low, finest = middle + 1, tried
        return (finest, False) if best is None else (best, True)

    def evaluations(self, candidate: _Candidate) -> Sequence[NewEvaluation]:
        """Return what is to be recorded of a candidate."""
        if self._evaluation is None or candidate.result is None:
            return ()
        return (self._evaluation.evaluation_of(candidate.result),)

    def _at(self, tolerance: float, max_error: float | None) -> _Candidate:
        try:
            encoded = self._codec.encode(self._original, self._vectors, tolerance=tolerance, max_error=max_error)
        except GeneratorError as error:
            raise DataError(str(error)) from error
        assert self._evaluation is not None
        known = self._evaluation.run((), again=False)
        with tempfile.TemporaryDirectory(prefix="icm-") as folder:
            written = Path(folder) / "adapter"
            save_adapter(self._codec.decode(encoded.data), written, dtype="bfloat16", card="", metadata={})
            loss = self._evaluation.loss_of("code", written)
        gain = retained_gain(known["base"].nats_per_token, known["original"].nats_per_token, loss.nats_per_token)
        result = RungResult("code", loss.nats_per_token, loss.tokens, loss.utf8_bytes, gain, encoded.dw_error)
        return _Candidate(encoded, result)
