"""Measure every source of some tasks on held-out text, with the base model, and record the results.

It takes no job lock. Results of an adapter or a code that was replaced during the measurement are not recorded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from icmlora.base_models.catalogue import check_examples, modality_of
from icmlora.base_models.examples.media_archive import read_examples
from icmlora.base_models.reading import EvaluationData
from icmlora.errors import BaseModelNotFound, BaseModelUnsuited, DataError
from icmlora.fleet.context import Context, Shard, has_loaders, locate_base, reporting, select_tasks
from icmlora.fleet.failures import FAILURES, BaseUnavailable, Failed, FailureLog, as_error
from icmlora.fleet.measure.measure import SOURCES, TaskLosses, record_measurements
from icmlora.fleet.measure.metric_result import MAX_TOKENS
from icmlora.fleet.measure.report import EvaluateReport, Measurable, TaskEvaluated
from icmlora.fleet.resources.decoding import read_context
from icmlora.fleet.resources.loading import ModelCache
from icmlora.fleet.resources.texts import adapter_template, own_text
from icmlora.fleet.resources.workers import OnProgress, worker_pool
from icmlora.formats.catalogue import format_named
from registry.errors import TaskNotFound
from registry.filters import Selection
from registry.manifests import Measurement, Source, Task

if TYPE_CHECKING:
    from icmlora.base_models.examples.context import TaskContext
    from registry.store import Store


def evaluate_in(
    context: Context,
    store: Store,
    tasks: Sequence[str],
    sources: Sequence[Source],
    device: str,
    workers: str | None,
    *,
    data: Path | None = None,
    max_tokens: int = MAX_TOKENS,
    with_context: bool = False,
    again: bool = False,
    shard: Shard | None = None,
) -> EvaluateReport:
    """Do the work of `evaluate` in an open store."""
    if unknown := sorted(set(sources).difference(SOURCES)):
        raise DataError(f"{unknown[0]!r} is not a source", hint=f"the sources are {', '.join(SOURCES)}")
    report = EvaluateReport()
    with reporting(report):
        given = None if data is None else read_examples(data)
        if given is not None:  # before a model is loaded
            check_examples(given, path=data, any_row=has_loaders())
        chosen = _tasks_with_text(store, tasks, shard, report, is_given=data is not None)
        failures = FailureLog(context, report, len(chosen))
        on_progress = context.counting(report.done, len(chosen))
        by_base = {label: list(group) for label, group in groupby(chosen, key=lambda task: task.base_model)}
        with worker_pool(context, store, device=device, workers=workers) as pool:
            for base_model, of_base in by_base.items():
                on_progress(f"loading {base_model}")
                asked = sources, data, given, max_tokens
                results = pool.each(
                    evaluate_tasks, of_base, on_progress, *asked, with_context=with_context, again=again
                )
                for task, result in failures.results(base_model, results):
                    _record(context, store, task.name, result, report)
                    on_progress(task.name)
        failures.check(len(by_base))
    return report


@dataclass(frozen=True)
class _TaskResults:
    """The measurements of one task, before they are recorded."""

    outcome: TaskEvaluated
    seen: Task  # as it was measured
    measured: Sequence[Measurement]
    note: str | None  # printed once for all tasks


def evaluate_tasks(
    models: ModelCache,
    tasks: Sequence[Task],
    on_progress: OnProgress,
    sources: Sequence[Source],
    path: Path | None,
    data: bytes | None,
    max_tokens: int,
    *,
    with_context: bool,
    again: bool,
) -> Iterator[tuple[Task, _TaskResults | Failed | BaseUnavailable | None]]:
    """Measure each task of one base model, on the bytes of the given file or on its own text; None if it was removed.

    `path` and `data` are the given file and its bytes; `evaluate` explains the other arguments.
    """
    texts = _Texts(models, path, data)
    for planned in tasks:
        result: _TaskResults | Failed | BaseUnavailable | None = None
        try:
            task = models.store.task(planned.name)
            text, base = texts.of(task), models.base(task.base_model)
            losses = TaskLosses(models, task, text, max_tokens)
            results = losses.measure(sources, again=again)
            context = read_context(models.store.blobs.read, task.final) if with_context else None
            contextual = losses.with_context(texts.of(task, context), sources, results) if context else {}
            outcome = TaskEvaluated(task.name, results, contextual, text.skipped, base.dtype)
            result = _TaskResults(outcome, task, losses.made, text.note)
        except (BaseModelNotFound, BaseModelUnsuited) as error:
            result = BaseUnavailable(error)
        except TaskNotFound:  # `icm rm` does not wait for this
            pass
        except FAILURES as error:
            result = Failed(as_error(error, models.loaded(planned.base_model), less="use a lower --max-tokens"))
        yield planned, result


def _record(context: Context, store: Store, name: str, made: _TaskResults | None, report: EvaluateReport) -> None:
    """Record the measurements of a task, except of an adapter or a code that was replaced."""
    if made is None:
        report.outdated.append(name)
        return
    try:
        is_current = record_measurements(store, made.seen, made.measured)
    except TaskNotFound:
        report.outdated.append(name)
        return
    if made.note is not None and made.note not in report.notes:
        report.notes.append(made.note)
    report.done.append(made.outcome)
    report.without_original += [] if "original" in made.outcome.sources else [name]
    report.outdated += [] if is_current else [name]
    context.on_event(made.outcome)


class _Texts:
    """The text that tasks of one base model are measured on: the file that the user gave, or else their own."""

    def __init__(self, models: ModelCache, path: Path | None, data: bytes | None) -> None:
        self._models, self._path, self._data = models, path, data
        self._shared: EvaluationData | None = None  # the given file, as most tasks read it

    def of(self, task: Task, context: TaskContext | None = None) -> EvaluationData:
        """Return the text of a task as its base model reads it, after a context if there is one."""
        store, base = self._models.store, self._models.base(task.base_model)
        if self._data is None:
            return own_text(store, task, base, context)
        template = adapter_template(store, task)
        if template is not None or context is not None:
            return EvaluationData.parse(self._data, base=base, path=self._path, template=template, context=context)
        if self._shared is None:
            self._shared = EvaluationData.parse(self._data, base=base, path=self._path, template=None)
        return self._shared


def _tasks_with_text(
    store: Store, names: Sequence[str], shard: Shard | None, report: EvaluateReport, *, is_given: bool
) -> list[Task]:
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


def measurable_in(store: Store, base_models: Sequence[str], tasks: Sequence[str]) -> Measurable:
    """Do the work of `measurable` in an open store."""
    result = Measurable([], [], [])
    for label in base_models:
        has_text, is_for_images = dict[str, bool](), False
        for task in store.tasks(Selection(base_model=label)):
            if not tasks or task.name in tasks:
                has_text[task.name] = task.eval_data is not None
                is_for_images = format_named(task.final.format).is_for_images
        if is_for_images:
            fact = f"{label} generates images; run `icm report --outputs TASK` to see the effect of codes"
            result.reasons.append(fact)
            continue
        result.elsewhere.append(label)
        try:
            modality_of(locate_base(store, label))
        except (BaseModelNotFound, BaseModelUnsuited) as error:
            result.reasons.append(str(error))
            continue
        result.tasks.extend(name for name, has in has_text.items() if has)
        if without := sum(not has for has in has_text.values()):
            result.reasons.append(f"{without} of {len(has_text)} tasks of {label} have no held-out text")
    return result
