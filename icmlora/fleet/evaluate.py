"""What other methods would keep of a task: encoded, decoded from the bytes, written, loaded by PEFT, measured.

Nothing of it is stored. A method that shares something prepares it from all tasks of the base model that still have
their originals, one adapter at a time.

Measure what each rung of a task does on held-out text, with the base model, and record it.

Methods side by side over the tasks of one evaluation: bytes of a task, error, retained gain.
"""

from __future__ import annotations

import math
import tempfile
from collections import defaultdict
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from icmlora.adapter.metrics import relative_dw_error
from icmlora.adapter.model import Adapter
from icmlora.base_models.catalogue import read_examples
from icmlora.base_models.examples import EvaluationData
from icmlora.base_models.likelihood import NllResult
from icmlora.base_models.modality import BaseModel
from icmlora.baselines.baseline import Baseline
from icmlora.baselines.catalogue import baseline_named
from icmlora.errors import BaseModelNotFound, DataError
from icmlora.fleet.context import Context, Event, Progress, StopFlag, chosen_tasks, locate_base
from icmlora.fleet.loading import open_base, read_original
from icmlora.fleet.measure import MAX_TOKENS, RUNGS, RungResult, TaskEvaluation, own_text
from icmlora.fleet.stats import BaseModelBill, Bill, TaskBill
from icmlora.formats.peft import load_adapter_folder, save_adapter
from icmlora.io.devices import resolve_device
from icmlora.io.files import read_regular
from registry.records import AdapterRecord, Rung

if TYPE_CHECKING:
    from registry.store import Store


@dataclass(frozen=True)
class BaselineResult:
    """One method on one task.

    Attributes:
        size: Bytes stored for this task alone.
        shared_size: Bytes stored once for the fleet.
        fleet_size: Tasks that share them.
        loss: On the held-out text.
        retained_gain: None where the original has no gain to keep.
        dw_error: None where the original is zero.
    """

    size: int
    shared_size: int
    fleet_size: int
    loss: NllResult
    retained_gain: float | None
    dw_error: float | None


class BaselineEvaluation:
    """Measures methods on tasks of one base model.

    Args:
        store: The open store.
        base_model: Label of the base model.
        names: Names of the methods.

    Raises:
        UnknownBaseline: One has no such name.
    """

    def __init__(self, store: Store, base_model: str, names: Sequence[str]) -> None:
        self._fleet = StoredOriginals(store, base_model)
        self._methods: dict[str, Baseline] = {name: baseline_named(name) for name in names}
        self._shared: dict[str, bytes] = {}

    def run(self, task: str, work: TaskEvaluation, rungs: Mapping[Rung, RungResult]) -> dict[str, BaselineResult]:
        """Measure every method on one task; none if its original was evicted.

        Args:
            task: The task's name in the store.
            work: The task's evaluation.
            rungs: Its results, base model and original among them.

        Raises:
            DataError: A loss that is no number.
        """
        if task not in self._fleet:
            return {}
        base, original = rungs["base"].nats_per_token, rungs["original"].nats_per_token
        results = {}
        for name, method in self._methods.items():
            shared = self._prepared(name)
            code = method.encode(self._fleet[task], shared)
            loss, error = self._measure(name, method.decode(code, shared), task, work)
            gain = work.gain(base, original, loss.nats_per_token)
            results[name] = BaselineResult(len(code), len(shared), len(self._fleet), loss, gain, error)
        return results

    def _prepared(self, name: str) -> bytes:
        if name not in self._shared:
            self._shared[name] = self._methods[name].prepare(self._fleet)
        return self._shared[name]

    def _measure(self, name: str, decoded: Adapter, task: str, work: TaskEvaluation) -> tuple[NllResult, float | None]:
        with tempfile.TemporaryDirectory(prefix="icm-") as folder:
            written = Path(folder) / "adapter"
            save_adapter(decoded, written, card="", metadata={})
            error = relative_dw_error(self._fleet[task], load_adapter_folder(written))
            return work.loss_of(name, written), error if math.isfinite(error) else None


class StoredOriginals(Mapping[str, Adapter]):
    """The originals of one base model that the store still has, read whenever they are asked for."""

    def __init__(self, store: Store, base_model: str) -> None:
        rows = (row for row in store.tasks.summaries() if row.task.base_model == base_model)
        self._store = store
        self._finals: dict[str, AdapterRecord] = {row.task.name: row.final for row in rows if not row.final.is_evicted}

    def __getitem__(self, task: str) -> Adapter:
        return read_original(self._store, self._finals[task])

    def __iter__(self) -> Iterator[str]:
        return iter(self._finals)

    def __len__(self) -> int:
        return len(self._finals)


_DATA_LIMIT = 64 << 20


@dataclass(frozen=True)
class EvaluateRequest:
    """What `icm eval` was asked for."""

    names: Sequence[str]
    device: str
    rungs: Sequence[Rung] = RUNGS
    data: Path | None = None
    max_tokens: int = MAX_TOKENS
    again: bool = False
    baselines: Sequence[str] = ()
    """Names of other methods to measure beside the rungs."""


@dataclass(frozen=True)
class TaskEvaluated(Event):
    """All rungs of one task are measured and recorded."""

    task: str
    rungs: Mapping[Rung, RungResult]
    baselines: Mapping[str, BaselineResult] = field(default_factory=dict)


@dataclass
class EvaluateReport:
    """What an evaluation did."""

    tasks: list[TaskEvaluated] = field(default_factory=list)
    without_data: list[str] = field(default_factory=list)
    without_original: list[str] = field(default_factory=list)
    """Tasks whose original was evicted before it was measured on this text: nothing says what its gain was."""
    outdated: list[str] = field(default_factory=list)
    """Tasks of which something was replaced while it was measured: that was not recorded."""
    stopped: bool = False


def evaluate(context: Context, request: EvaluateRequest, stop: StopFlag) -> Generator[Event, None, EvaluateReport]:
    """Measure tasks one after the other; what is recorded stays, and is not measured again on the same text.

    Raises:
        DeviceUnavailable: The device is not there.
        BaseModelNotFound: A base model is not on this machine.
        DataError: No task has held-out text, or the text cannot be used.
        TaskNotFound: A name is not in the store.
        UnknownBaseline: There is no method of that name.
    """
    for name in request.baselines:
        baseline_named(name)  # before a model is loaded
    device = resolve_device(request.device)
    report = EvaluateReport()
    given = None
    if request.data is not None:
        content = read_regular(request.data, max_bytes=_DATA_LIMIT)
        given = EvaluationData.parse(content, path=request.data, read=read_examples)
    with context.open() as store:
        tasks = chosen_tasks(store, request.names)
        todo = [task for task in tasks if given is not None or task.eval_data is not None]
        report.without_data = sorted({task.name for task in tasks} - {task.name for task in todo})
        if not todo:
            hint = "put eval.jsonl beside the adapter and ingest it again, or give --data"
            raise DataError("no task has held-out text", hint=hint)
        yield Progress(0, len(todo))
        base: BaseModel | None = None
        others: BaselineEvaluation | None = None
        for task in todo:
            if stop.requested:
                report.stopped = True
                break
            if base is None or base.label != task.base_model:
                yield Progress(len(report.tasks), len(todo), f"loading {task.base_model}")
                base = open_base(store, task.base_model, device, cache=context.cache)
                others = BaselineEvaluation(store, task.base_model, request.baselines)
            data = given or own_text(store, base, task)
            work = TaskEvaluation(store, base, task, data, request.max_tokens)
            rungs = work.run(request.rungs, again=request.again)
            done = TaskEvaluated(task.name, rungs, others.run(task.name, work, rungs) if others else {})
            report.tasks.append(done)
            if "original" not in done.rungs:
                report.without_original.append(task.name)
            if work.is_outdated:
                report.outdated.append(task.name)
            yield done
            yield Progress(len(report.tasks), len(todo), task.name)
    return report


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


def evaluable(context: Context, base_models: Sequence[str], only: Sequence[str] = ()) -> tuple[list[str], list[str]]:
    """Return the tasks of some base models that can be measured here, and why others cannot.

    Args:
        context: The store.
        base_models: Their labels.
        only: Tasks to look at; all if there is none.
    """
    reasons: list[str] = []
    names: list[str] = []
    with context.open(read_only=True) as store:
        for label in base_models:
            tasks = [task for task in store.tasks.all() if task.base_model == label and (not only or task.name in only)]
            try:
                locate_base(store, label)
            except BaseModelNotFound as error:
                reasons.append(str(error))
                continue
            names += [task.name for task in tasks if task.eval_data is not None]
            without = sum(task.eval_data is None for task in tasks)
            if without:
                reasons.append(f"{without} of {len(tasks)} tasks of {label} have no held-out text")
    return names, reasons


@dataclass(frozen=True)
class MethodSummary:
    """One method over the tasks it was measured on.

    Attributes:
        method: A rung or a baseline.
        tasks: How many.
        task_size: Mean bytes of a task, its part of what is stored once included.
        marginal_size: Mean bytes of one more task.
        share: `task_size` in terms of bf16.
        dw_error: Mean relative dW error; None where none was measured.
        mean: Mean retained gain; None where no original has a gain.
        worst: Smallest retained gain.
        worst_task: Whose it is.
    """

    method: str
    tasks: int
    task_size: float
    marginal_size: float
    share: float
    dw_error: float | None
    mean: float | None
    worst: float | None
    worst_task: str | None


@dataclass(frozen=True)
class _Cell:
    """One method on one task."""

    task: str
    bf16: int
    marginal: float
    shared: float
    gain: float | None
    dw_error: float | None


def compare(report: EvaluateReport, bill: Bill) -> list[MethodSummary]:
    """Sum up the rungs that have bytes and all baselines, most bytes first.

    A task that is not in the bill is passed over: it was removed since it was measured.
    """
    bills = {task.task: (fleet, task) for fleet in bill.fleets for task in fleet.tasks}
    cells: defaultdict[str, list[_Cell]] = defaultdict(list)
    for done in report.tasks:
        if done.task in bills:
            for method, cell in _cells(done, *bills[done.task]):
                cells[method].append(cell)
    return sorted((_summary(method, found) for method, found in cells.items()), key=lambda row: -row.task_size)


def _cells(done: TaskEvaluated, fleet: BaseModelBill, task: TaskBill) -> Iterator[tuple[str, _Cell]]:
    rungs = {str(rung): result for rung, result in done.rungs.items()}
    code = (task.code_size or 0) + task.vectors_size
    sizes = {"residual": task.size, "code": code, "generate": task.vectors_size}
    for rung, size in sizes.items():
        if rung in rungs:
            shared = fleet.generator_size / max(len(fleet.encoded), 1)
            found = rungs[rung]
            yield rung, _Cell(done.task, task.bf16_size, size, shared, found.retained_gain, found.dw_error)
    for name, result in done.baselines.items():
        shared = result.shared_size / result.fleet_size
        yield name, _Cell(done.task, task.bf16_size, result.size, shared, result.retained_gain, result.dw_error)


def _summary(method: str, cells: list[_Cell]) -> MethodSummary:
    count = len(cells)
    total = sum(cell.marginal + cell.shared for cell in cells)
    errors = [cell.dw_error for cell in cells if cell.dw_error is not None]
    gains = [(cell.gain, cell.task) for cell in cells if cell.gain is not None]
    worst, worst_task = min(gains, default=(None, None))
    return MethodSummary(
        method=method,
        tasks=count,
        task_size=total / count,
        marginal_size=sum(cell.marginal for cell in cells) / count,
        share=total / max(sum(cell.bf16 for cell in cells), 1),
        dw_error=math.fsum(errors) / len(errors) if errors else None,
        mean=math.fsum(gain for gain, _ in gains) / len(gains) if gains else None,
        worst=worst,
        worst_task=worst_task,
    )
