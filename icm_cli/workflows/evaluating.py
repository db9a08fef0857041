"""Measure what each rung of a task does on held-out text, with the base model, and record it."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from icm_cli.workflows.base_access import locate_base, open_base
from icm_cli.workflows.baseline_evaluation import BaselineEvaluation, BaselineResult
from icm_cli.workflows.chosen import chosen_tasks
from icm_cli.workflows.events import Event, Step, StopFlag
from icm_cli.workflows.opening import Place
from icm_cli.workflows.task_evaluation import MAX_TOKENS, RUNGS, RungResult, TaskEvaluation
from icmlora.base_model import BaseModel
from icmlora.baselines.catalogue import baseline_named
from icmlora.device import resolve_device
from icmlora.errors import BaseModelNotFound, DataError
from icmlora.examples import EvaluationData
from icmlora.files import read_regular
from registry.records import Rung

if TYPE_CHECKING:
    pass

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


def evaluate(place: Place, request: EvaluateRequest, stop: StopFlag) -> Generator[Event, None, EvaluateReport]:
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
        given = EvaluationData.parse(content, path=request.data)
    with place.open() as store:
        tasks = chosen_tasks(store, request.names)
        todo = [task for task in tasks if given is not None or task.eval_data is not None]
        report.without_data = sorted({task.name for task in tasks} - {task.name for task in todo})
        if not todo:
            hint = "put eval.jsonl beside the adapter and ingest it again, or give --data"
            raise DataError("no task has held-out text", hint=hint)
        yield Step(0, len(todo))
        base: BaseModel | None = None
        others: BaselineEvaluation | None = None
        for task in todo:
            if stop.requested:
                report.stopped = True
                break
            if base is None or base.label != task.base_model:
                yield Step(len(report.tasks), len(todo), f"loading {task.base_model}")
                base = open_base(store, task.base_model, device)
                others = BaselineEvaluation(store, task.base_model, request.baselines)
            data = given or EvaluationData.parse(store.read_blob(str(task.eval_data)), path=task.name)
            work = TaskEvaluation(store, base, task, data, request.max_tokens)
            rungs = work.run(request.rungs, again=request.again)
            done = TaskEvaluated(task.name, rungs, others.run(task.name, work, rungs) if others else {})
            report.tasks.append(done)
            if "original" not in done.rungs:
                report.without_original.append(task.name)
            if work.is_outdated:
                report.outdated.append(task.name)
            yield done
            yield Step(len(report.tasks), len(todo), task.name)
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


def evaluable(place: Place, base_models: Sequence[str], only: Sequence[str] = ()) -> tuple[list[str], list[str]]:
    """Return the tasks of some base models that can be measured here, and why others cannot.

    Args:
        place: The store.
        base_models: Their labels.
        only: Tasks to look at; all if there is none.
    """
    reasons: list[str] = []
    names: list[str] = []
    with place.open(read_only=True) as store:
        for label in base_models:
            tasks = [task for task in store.tasks() if task.base_model == label and (not only or task.name in only)]
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
