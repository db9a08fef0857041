"""Measure every source of some tasks on held-out text, with the base model, and record the results.

It takes no job lock. A result whose adapter or code was replaced while it was measured is not recorded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from icmlora.base_models.catalogue import check_examples, modality_of
from icmlora.base_models.examples.examples import EvaluationData
from icmlora.base_models.examples.media_archive import read_examples
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
from icmlora.fleet.failures import FAILURES, BaseModelLeftOut, BaseUnavailable, Failed, FailureLog, as_error
from icmlora.fleet.measure.measure import SOURCES, Measurement, SourceResult, TaskLosses, record_measurements
from icmlora.fleet.measure.metric_result import MAX_TOKENS, source_name
from icmlora.fleet.resources.decoding import read_context
from icmlora.fleet.resources.loading import Models
from icmlora.fleet.resources.texts import adapter_template, own_text
from icmlora.fleet.resources.workers import Tell, check_place, worker_pool
from icmlora.fleet.stats.stats import Spread
from icmlora.formats.catalogue import format_named
from registry.errors import TaskNotFound
from registry.records import Rung, TaskRecord

if TYPE_CHECKING:
    from icmlora.base_models.examples.context import TaskContext
    from registry.store import Store


@dataclass(frozen=True)
class TaskEvaluated(Event):
    """One task is measured, and its results are recorded."""

    task: str
    sources: Mapping[Rung, SourceResult]
    # Behind the task's context, where that was asked for and it has one; gains are shares of the original's alone.
    with_context: Mapping[Rung, SourceResult] = field(default_factory=dict)
    skipped: str | None = None
    precision: str | None = None  # of the base model, such as "float32" or "nf4"


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

    @property
    def is_partial(self) -> bool:
        """Whether a task that icm can run was not measured."""
        return bool(self.failed) or any(not base.is_unsuited for base in self.left_out)

    def gain_of(self, source: str) -> Spread | None:
        """Sum up the retained gain of one source; None where no task has one."""
        return Spread.of(
            (task.task, result.retained_gain, task.precision)
            for task in self.tasks
            for name, result in task.sources.items()
            if name == source
        )


@use_case
def evaluate(
    context: Context,
    tasks: Sequence[str] = (),
    *,
    sources: Sequence[Rung | Literal["recalled"]] = ("code", "recalled"),
    data: str | Path | None = None,
    max_tokens: int = MAX_TOKENS,
    with_context: bool = False,
    device: str = "auto",
    again: bool = False,
    workers: str | None = None,
    shard: str | None = None,
) -> EvaluateReport:
    """Measure the sources of tasks on held-out text, with the base model, and record the results.

    Args:
        context: The store, and who listens.
        tasks: Names of tasks; all by default.
        sources: What to measure in addition to base model and original, where a task has it; `materialize` names them.
        data: File of held-out text as JSON lines; each task's own by default.
        max_tokens: Tokens scored in each text.
        with_context: Measure also behind the contexts of tasks; these results are not recorded.
        device: Where to compute.
        again: Measure again what was measured on the same text before.
        workers: Where to compute, as described for `Fleet`.
        shard: Which part of the tasks to work on, as described for `Fleet`.

    Raises:
        DataError: No task has held-out text, or the text cannot be used.
        BaseModelNotFound: None of the base models is on this machine. The report names those that are missing.
    """
    # A typing error is told before a model is loaded.
    rungs: list[Rung] = ["generate" if source == "recalled" else source for source in sources]  # as the rows have it
    if unknown := sorted(set(rungs).difference(SOURCES)):
        raise DataError(
            f"{unknown[0]!r} is not a source", hint=f"the sources are {', '.join(map(source_name, SOURCES))}"
        )
    check_place(device, workers)
    report, path = EvaluateReport(), None if data is None else Path(data)
    with context.open() as store, reporting(report):
        given = None if path is None else read_examples(path)
        if given is not None:  # before a model is loaded
            check_examples(given, path=path, any_row=has_loaders(store))
        chosen = _tasks_with_text(store, tasks, Shard.of(shard), report, is_given=path is not None)
        failures = FailureLog(context, report, len(chosen))
        tell = context.counting(report.tasks, len(chosen))
        by_base = {label: list(group) for label, group in groupby(chosen, key=lambda task: task.base_model)}
        with worker_pool(context, store, device=device, workers=workers) as pool:
            for base_model, of_base in by_base.items():
                tell(f"loading {base_model}")
                asked = rungs, path, given, max_tokens
                results = pool.each(evaluate_tasks, of_base, tell, *asked, with_context=with_context, again=again)
                for task, made in failures.results(base_model, results):
                    _record(context, store, task.name, made, report)
                    tell(task.name)
        failures.check(len(by_base))
    return report


@dataclass(frozen=True)
class _TaskResults:
    """What was measured of one task, before it is recorded."""

    task: TaskEvaluated
    made: Sequence[Measurement]
    note: str | None  # what is said once of all tasks


def evaluate_tasks(
    models: Models,
    tasks: Sequence[TaskRecord],
    tell: Tell,
    sources: Sequence[Rung],
    path: Path | None,
    data: bytes | None,
    max_tokens: int,
    *,
    with_context: bool,
    again: bool,
) -> Iterator[tuple[TaskRecord, _TaskResults | Failed | BaseUnavailable | None]]:
    """Measure each task of one base model, on the bytes of the given file or on its own text; None if it was removed.

    `path` and `data` are the given file and its bytes; `evaluate` explains the other arguments.
    """
    texts = _Texts(models, path, data)

    def context_of(task: TaskRecord) -> TaskContext | None:
        return read_context(models.store.blobs.read, models.store.tasks.final(task.name)) if with_context else None

    for task in tasks:
        result: _TaskResults | Failed | BaseUnavailable | None = None
        try:
            text, base = texts.of(task), models.base(task.base_model)
            losses = TaskLosses(models.store, models, task, text, max_tokens)
            found = losses.measure(sources, again=again)
            behind = losses.behind(texts.of(task, context), sources, found) if (context := context_of(task)) else {}
            done = TaskEvaluated(task.name, found, behind, text.skipped, base.dtype)
            result = _TaskResults(done, losses.made, text.note)
        except (BaseModelNotFound, BaseModelUnsuited) as error:
            result = BaseUnavailable(error)
        except TaskNotFound:  # `icm rm` does not wait for this
            pass
        except FAILURES as error:
            result = Failed(as_error(error, models.loaded(task.base_model), less="use a lower --max-tokens"))
        yield task, result


def _record(context: Context, store: Store, name: str, made: _TaskResults | None, report: EvaluateReport) -> None:
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
    report.tasks.append(made.task)
    report.without_original += [] if "original" in made.task.sources else [name]
    report.outdated += [] if is_current else [name]
    context.on_event(made.task)


class _Texts:
    """What tasks of one base model are measured on: the file that the user gave, or else their own held-out text."""

    def __init__(self, models: Models, path: Path | None, data: bytes | None) -> None:
        self._models, self._path, self._data = models, path, data
        self._shared: EvaluationData | None = None  # the given file, as most tasks read it

    def of(self, task: TaskRecord, context: TaskContext | None = None) -> EvaluationData:
        """Return the text of a task as its base model reads it, behind a context if there is one."""
        store, base = self._models.store, self._models.base(task.base_model)
        if self._data is None:
            return own_text(store, task, base, context)
        template = adapter_template(store, task.name)
        if template is not None or context is not None:
            return EvaluationData.parse(self._data, base=base, path=self._path, template=template, context=context)
        if self._shared is None:
            self._shared = EvaluationData.parse(self._data, base=base, path=self._path, template=None)
        return self._shared


def _tasks_with_text(
    store: Store, names: Sequence[str], shard: Shard | None, report: EvaluateReport, *, is_given: bool
) -> list[TaskRecord]:
    """Return the tasks to measure; without a given file, those that have text of their own."""
    tasks = select_tasks(store, names, shard=shard)
    if is_given:
        return tasks
    report.without_data = sorted(task.name for task in tasks if task.eval_data is None)
    found = [task for task in tasks if task.eval_data is not None]
    if not found and shard is None:  # a shard may be empty
        hint = "add eval.jsonl to the adapter's folder and ingest it again, or use --data"
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
                found.reasons.append(
                    f"{label} generates images; run `icm report --outputs TASK` to see the effect of codes"
                )
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
