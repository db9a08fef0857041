"""Measure what each rung of a task does on held-out text, with the base model, and record it.

Every adapter is written to a folder and loaded by PEFT before it is measured: what counts is what a user would get.
"""

from __future__ import annotations

import tempfile
from collections.abc import Generator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from icm_cli.workflows.base_access import locate_base, open_base
from icm_cli.workflows.events import Event, Step, StopFlag
from icm_cli.workflows.materializing import MaterializeRequest, write_rung
from icm_cli.workflows.opening import Place
from icmlora.adapted import adapted
from icmlora.base_model import BaseModel
from icmlora.device import resolve_device
from icmlora.errors import BaseModelNotFound, DataError
from icmlora.evaluation import NllResult, nll, retained_gain
from icmlora.examples import EvaluationData
from icmlora.files import read_regular
from icmlora.metrics import relative_dw_error
from icmlora.peft_folder import load_adapter_folder
from registry.records import EvaluationRecord, NewEvaluation, Rung, TaskRecord

if TYPE_CHECKING:
    from registry.store import Store

RUNGS: tuple[Rung, ...] = ("base", "original", "code", "generate")
_DATA_LIMIT = 64 << 20


@dataclass(frozen=True)
class EvaluateRequest:
    """What `icm eval` was asked for."""

    names: Sequence[str]
    device: str
    rungs: Sequence[Rung] = RUNGS
    data: Path | None = None
    max_tokens: int = 256
    again: bool = False


@dataclass(frozen=True)
class RungResult:
    """One rung of one task, measured on one set of texts."""

    rung: Rung
    nats_per_token: float
    tokens: int
    utf8_bytes: int
    retained_gain: float | None
    dw_error: float | None

    def as_loss(self) -> NllResult:
        """Return the loss with its perplexity and bits per byte."""
        return NllResult(self.nats_per_token * self.tokens, self.tokens, self.utf8_bytes)


@dataclass(frozen=True)
class TaskEvaluated(Event):
    """All rungs of one task are measured and recorded."""

    task: str
    rungs: dict[Rung, RungResult]


@dataclass
class EvaluateReport:
    """What an evaluation did."""

    tasks: list[TaskEvaluated] = field(default_factory=list)
    without_data: list[str] = field(default_factory=list)
    stopped: bool = False


def evaluate(
    place: Place, request: EvaluateRequest, stop: StopFlag
) -> Generator[Event, None, EvaluateReport]:
    """Measure tasks one after the other; what is recorded stays, and is not measured again on the same text.

    Raises:
        DeviceUnavailable: The device is not there.
        BaseModelNotFound: A base model is not on this machine.
        DataError: No task has held-out text.
    """
    device = resolve_device(request.device)
    report = EvaluateReport()
    with place.open() as store:
        tasks = [store.task(name) for name in request.names] or list(store.tasks())
        texts = None if request.data is None else read_regular(request.data, max_bytes=_DATA_LIMIT)
        report.without_data = [task.name for task in tasks if texts is None and task.eval_data is None]
        todo = sorted((t for t in tasks if t.name not in report.without_data), key=lambda t: (t.base_model, t.name))
        if not todo:
            hint = "put eval.jsonl beside the adapter and ingest it again, or give --data"
            raise DataError("no task has held-out text", hint=hint)
        yield Step(0, len(todo))
        base: BaseModel | None = None
        for task in todo:
            if stop.requested:
                report.stopped = True
                break
            if base is None or base.label != task.base_model:
                base = open_base(store, task.base_model, device)
            data = EvaluationData.parse(texts if texts is not None else store.read_blob(str(task.eval_data)))
            done = TaskEvaluated(task.name, _TaskEvaluation(store, base, task, data, request).run())
            report.tasks.append(done)
            yield done
            yield Step(len(report.tasks), len(todo), task.name)
    return report


class _TaskEvaluation:
    """One task on one set of texts; base and original first, since every gain is relative to them."""

    def __init__(
        self, store: Store, base: BaseModel, task: TaskRecord, data: EvaluationData, request: EvaluateRequest
    ) -> None:
        self._store, self._base, self._task, self._data, self._request = store, base, task, data, request
        self._generator = store.current_generator(task.base_model)
        self._settings = {"max_tokens": request.max_tokens, "dtype": base.dtype, "base": base.fingerprint}
        self._original = store.final_adapter(task.name).weights

    def run(self) -> dict[Rung, RungResult]:
        """Measure the rungs that were asked for and that exist."""
        known = {} if self._request.again else self._recorded()
        results: dict[Rung, RungResult] = {}
        for rung in RUNGS:
            if rung not in self._wanted():
                continue
            if rung not in known:
                known[rung] = self._measure(rung, results)
                self._store.add_evaluations([self._row(known[rung])])
            results[rung] = known[rung]
        return results

    def _wanted(self) -> set[Rung]:
        wanted: set[Rung] = {"base", "original", *self._request.rungs}
        if self._generator is None or self._store.code(self._task.name, self._generator.id) is None:
            wanted -= {"code"}
        if self._generator is None or not self._store.vectors(self._task.name):
            wanted -= {"generate"}
        return wanted

    def _measure(self, rung: Rung, results: dict[Rung, RungResult]) -> RungResult:
        with tempfile.TemporaryDirectory(prefix="icm-") as folder:
            error = None
            model = nullcontext(self._base.model)
            if rung != "base":
                written = Path(folder) / "adapter"
                write_rung(self._store, MaterializeRequest(self._task.name, written, source=rung))
                error = self._dw_error(rung, written, Path(folder) / "original")
                model = adapted(self._base, written)  # type: ignore[assignment]
            with model as ready:
                loss = nll(ready, self._base.tokenizer, self._data.examples, max_tokens=self._request.max_tokens)
        gain = None
        if rung not in ("base", "original"):
            base, original = results["base"], results["original"]
            gain = retained_gain(base.nats_per_token, original.nats_per_token, loss.nats_per_token)
        return RungResult(rung, loss.nats_per_token, loss.tokens, loss.utf8_bytes, gain, error)

    def _dw_error(self, rung: Rung, written: Path, beside: Path) -> float | None:
        if rung == "original":
            return None
        write_rung(self._store, MaterializeRequest(self._task.name, beside, source="original"))
        return relative_dw_error(load_adapter_folder(beside), load_adapter_folder(written))

    def _recorded(self) -> dict[Rung, RungResult]:
        """Return what was measured before on the same text, in the same way, of the same adapter and generator."""
        rows = [row for row in self._store.evaluations(self._task.name) if self._is_current(row)]
        return {
            row.rung: RungResult(
                row.rung, row.nats_per_token, row.tokens, row.utf8_bytes, row.retained_gain, row.dw_error
            )
            for row in rows
        }

    def _is_current(self, row: EvaluationRecord) -> bool:
        made_by = self._made_by(row.rung)
        return (row.data, row.generator_id, dict(row.settings)) == (self._data.digest, made_by, self._all_settings())

    def _made_by(self, rung: Rung) -> int | None:
        return self._generator.id if self._generator is not None and rung in ("code", "generate") else None

    def _all_settings(self) -> dict[str, object]:
        return self._settings | {"original": self._original}

    def _row(self, result: RungResult) -> NewEvaluation:
        return NewEvaluation(
            task=self._task.name,
            rung=result.rung,
            generator_id=self._made_by(result.rung),
            data=self._data.digest,
            nats_per_token=result.nats_per_token,
            tokens=result.tokens,
            utf8_bytes=result.utf8_bytes,
            retained_gain=result.retained_gain,
            dw_error=result.dw_error,
            settings=self._all_settings(),
        )


@dataclass(frozen=True)
class GainSummary:
    """Retained gain of one rung over the tasks of a report."""

    tasks: int
    mean: float
    worst: float
    worst_task: str


def summarise(report: EvaluateReport, rung: str) -> GainSummary | None:
    """Sum up one rung; None where no task has a retained gain for it."""
    gains = [
        (result.retained_gain, task.task)
        for task in report.tasks
        for name, result in task.rungs.items()
        if name == rung and result.retained_gain is not None
    ]
    if not gains:
        return None
    worst, name = min(gains)
    return GainSummary(len(gains), sum(gain for gain, _ in gains) / len(gains), worst, name)


def evaluable(place: Place, base_models: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the tasks of some base models that can be measured here, and why others cannot."""
    reasons: list[str] = []
    names: list[str] = []
    with place.open(read_only=True) as store:
        for record in store.base_models():
            if record.name not in base_models:
                continue
            tasks = [task for task in store.tasks() if task.base_model == record.name]
            try:
                locate_base(store, record.name)
            except BaseModelNotFound as error:
                reasons.append(str(error))
                continue
            names += [task.name for task in tasks if task.eval_data is not None]
            without = sum(task.eval_data is None for task in tasks)
            if without:
                reasons.append(f"{without} of {len(tasks)} tasks of {record.name} have no held-out text")
    return names, reasons
