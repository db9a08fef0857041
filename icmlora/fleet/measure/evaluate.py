"""Measure every source of some tasks on held-out text, with the base model, and record the results.

It takes no job lock. A result whose adapter or code was replaced while it was measured is not recorded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from icmlora.base_models.catalogue import check_examples, modality_of
from icmlora.base_models.examples.examples import EvaluationData
from icmlora.base_models.examples.media_archive import read_examples
from icmlora.baselines.catalogue import baseline_named
from icmlora.errors import BaseModelNotFound, BaseModelUnsuited, DataError
from icmlora.fleet.context import (
    Context,
    Event,
    Shard,
    TaskFailed,
    has_loaders,
    locate_base,
    reporting,
    select_tasks,
    use_case,
)
from icmlora.fleet.failures import FAILURES, BaseModelLeftOut, BaseUnavailable, Failed, Sieve, as_error
from icmlora.fleet.measure.baselines import BaselineResult, Baselines
from icmlora.fleet.measure.measure import (
    MAX_TOKENS,
    SOURCES,
    Measurement,
    SourceResult,
    TaskLosses,
    record_measurements,
)
from icmlora.fleet.resources.loading import Models
from icmlora.fleet.resources.texts import adapter_template, own_text
from icmlora.fleet.resources.workers import Tell, check_place, open_workers
from icmlora.formats.catalogue import format_named
from registry.errors import TaskNotFound
from registry.records import Rung, TaskRecord

if TYPE_CHECKING:
    from icmlora.base_models.examples.chat_template import Templates
    from icmlora.base_models.modality import BaseModel
    from registry.store import Store

"""Bytes of a file with held-out text."""


@dataclass(frozen=True)
class EvaluateRequest:
    """What to measure."""

    names: Sequence[str] = ()
    sources: Sequence[Rung] = SOURCES
    data: Path | None = None
    max_tokens: int = MAX_TOKENS
    again: bool = False
    baselines: Sequence[str] = ()
    device: str = "auto"
    workers: str | None = None
    shard: Shard | None = None


@dataclass(frozen=True)
class TaskEvaluated(Event):
    """One task is measured, and its results are recorded."""

    task: str
    sources: Mapping[Rung, SourceResult]
    baselines: Mapping[str, BaselineResult] = field(default_factory=dict)
    skipped: str | None = None
    precision: str | None = None  # of the base model, such as "float32" or "nf4"


@dataclass(frozen=True)
class GainSummary:
    """Retained gain of one source over some tasks."""

    tasks: int
    mean: float
    worst: float
    worst_task: str
    precisions: tuple[str, ...] = ()  # of the base models, sorted


@dataclass
class EvaluateReport:
    """What was measured."""

    tasks: list[TaskEvaluated] = field(default_factory=list)
    without_data: list[str] = field(default_factory=list)
    without_original: list[str] = field(default_factory=list)
    outdated: list[str] = field(default_factory=list)
    failed: list[TaskFailed] = field(default_factory=list)
    left_out: list[BaseModelLeftOut] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, done: TaskEvaluated, *, is_outdated: bool) -> None:
        """Add a task that is done."""
        self.tasks.append(done)
        if "original" not in done.sources:
            self.without_original.append(done.task)
        if is_outdated:
            self.outdated.append(done.task)

    def gain_of(self, source: str) -> GainSummary | None:
        """Sum up the retained gain of one source; None where no task has one."""
        gains = [
            (result.retained_gain, task.task, task.precision)
            for task in self.tasks
            for name, result in task.sources.items()
            if name == source and result.retained_gain is not None
        ]
        if not gains:
            return None
        worst, worst_task, _ = min(gains, key=lambda row: row[:2])
        precisions = tuple(sorted({precision for *_, precision in gains if precision is not None}))
        return GainSummary(len(gains), sum(gain for gain, *_ in gains) / len(gains), worst, worst_task, precisions)


def evaluate(context: Context, request: EvaluateRequest) -> EvaluateReport:
    """Measure tasks one after the other; the results of each are recorded at once, and a task that fails is reported.

    Raises:
        BaseModelNotFound: None of the base models is on this machine.
    """
    # A typing error is told before a model is loaded.
    if unknown := sorted(set(request.sources).difference(SOURCES)):
        raise DataError(f"{unknown[0]!r} is not a source", hint=f"the sources are {', '.join(SOURCES)}")
    for name in request.baselines:
        baseline_named(name)
    check_place(request.device, request.workers)
    report = EvaluateReport()
    with context.open() as store, reporting(report):
        make = partial(_Evaluator, request, _given_data(request.data, any_row=has_loaders(store)))
        tasks = _tasks_with_text(store, request, report)
        sieve = Sieve(context, report, len(tasks))
        context.progress(0, len(tasks))

        def tell(note: str) -> None:
            context.progress(len(report.tasks), len(tasks), note)

        by_base = {label: list(group) for label, group in groupby(tasks, key=lambda task: task.base_model)}
        with open_workers(context, store, make, device=request.device, workers=request.workers) as workers:
            for base_model, of_base in by_base.items():
                tell(f"loading {base_model}")
                for task, made in sieve.results(base_model, workers.each(of_base, tell)):
                    _record(context, store, task.name, made, report)
                    tell(task.name)
        sieve.check(len(by_base))
    return report


@dataclass(frozen=True)
class _Measured:
    """What was measured of one task, before it is recorded."""

    task: TaskEvaluated
    made: Sequence[Measurement]
    note: str | None  # what is said once of all tasks


class _Evaluator:
    """Measures one task after the other."""

    def __init__(self, request: EvaluateRequest, given: bytes | None, models: Models) -> None:
        self._request, self._given, self._models = request, given, models
        self._of_base: tuple[str, _Texts, Baselines] | None = None

    def __call__(self, task: TaskRecord, tell: Tell) -> _Measured | Failed | BaseUnavailable | None:
        """Measure a task; None if it was removed in the meantime."""
        try:
            return self._measure(task, self._models.base(task.base_model))
        except (BaseModelNotFound, BaseModelUnsuited) as error:
            return BaseUnavailable(error)
        except TaskNotFound:  # `icm rm` does not wait for this
            return None
        except FAILURES as error:
            return Failed(as_error(error, self._models.loaded(task.base_model), less="fewer --max-tokens"))

    def _measure(self, task: TaskRecord, base: BaseModel) -> _Measured:
        store, request = self._models.store, self._request
        if self._of_base is None or self._of_base[0] != task.base_model:
            texts = _Texts(store, base, request.data, self._given)
            self._of_base = task.base_model, texts, Baselines(store, task.base_model, request.baselines)
        _, texts, baselines = self._of_base
        text = texts.of(task)
        losses = TaskLosses(store, self._models, task, text, request.max_tokens)
        sources = losses.measure(request.sources, again=request.again)
        others = baselines.measure(task.name, losses, sources)
        done = TaskEvaluated(task.name, sources, others, text.skipped, base.dtype)
        return _Measured(done, losses.made, text.note)


def _record(context: Context, store: Store, name: str, made: _Measured | None, report: EvaluateReport) -> None:
    """Record what was measured of a task, without what belongs to an adapter or a code that was replaced meanwhile."""
    if made is None:
        report.outdated.append(name)
        return
    try:
        is_current = record_measurements(store, made.made)
    except TaskNotFound:
        report.outdated.append(name)
        return
    if made.note is not None and made.note not in report.notes:
        report.notes.append(made.note)
    report.add(made.task, is_outdated=not is_current)
    context.on_event(made.task)


class _Texts:
    """What the tasks of a base model are measured on: the file that the user gave, or else their own held-out text."""

    def __init__(self, store: Store, base: BaseModel, path: Path | None, data: bytes | None) -> None:
        self._store, self._base, self._path, self._data = store, base, path, data

    def of(self, task: TaskRecord) -> EvaluationData:
        """Return the text of a task as its base model reads it."""
        if self._data is None:
            return own_text(self._store, task, self._base)
        template = adapter_template(self._store, task.name)
        return self._shared if template is None else self._parsed(template)

    @cached_property
    def _shared(self) -> EvaluationData:
        return self._parsed(None)

    def _parsed(self, template: Templates | None) -> EvaluationData:
        assert self._data is not None
        return EvaluationData.parse(self._data, base=self._base, path=self._path, template=template)


def _given_data(path: Path | None, *, any_row: bool) -> bytes | None:
    """Read the file of `data`, and check that it has text before any model is loaded."""
    if path is None:
        return None
    data = read_examples(path)
    check_examples(data, path=path, any_row=any_row)
    return data


def _tasks_with_text(store: Store, request: EvaluateRequest, report: EvaluateReport) -> list[TaskRecord]:
    tasks = select_tasks(store, request.names, shard=request.shard)
    if request.data is not None:
        return tasks
    report.without_data = sorted(task.name for task in tasks if task.eval_data is None)
    found = [task for task in tasks if task.eval_data is not None]
    if not found and request.shard is None:  # a shard may be empty
        hint = "put eval.jsonl into the adapter's folder and ingest it again, or use --data"
        raise DataError("no task has held-out text", hint=hint)
    return found


@dataclass(frozen=True)
class Measurable:
    """Which tasks can be measured on this machine, why others cannot, and of which base models some could elsewhere."""

    tasks: list[str]
    reasons: list[str]
    elsewhere: list[str]


@use_case
def measurable(context: Context, base_models: Sequence[str], tasks: Sequence[str] = ()) -> Measurable:
    """Return which `tasks` of some `base_models` this machine can measure, and why it cannot measure others."""
    found = Measurable([], [], [])
    with context.open(read_only=True) as store:
        for label in base_models:
            known = [
                task for task in store.tasks.all() if task.base_model == label and (not tasks or task.name in tasks)
            ]
            if known and format_named(store.tasks.final(known[0].name).format).is_for_images:
                found.reasons.append(f"{label} makes images: `icm report --outputs TASK` shows what codes change")
                continue
            found.elsewhere.append(label)
            try:
                modality_of(locate_base(store, label))
            except (BaseModelNotFound, BaseModelUnsuited) as error:
                found.reasons.append(str(error))
                continue
            found.tasks.extend(task.name for task in known if task.eval_data is not None)
            without = sum(task.eval_data is None for task in known)
            if without:
                found.reasons.append(f"{without} of {len(known)} tasks of {label} have no held-out text")
    return found
