"""Extract task vectors: `icm vectors`."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated

from icmlora.fleet.context import Context, Event, Shard, reporting, use_case
from icmlora.fleet.failures import FailureLog
from icmlora.fleet.params import Device, Param, ShardOf, Tasks, Workers
from icmlora.fleet.results import Report
from registry.errors import TaskNotFound

if TYPE_CHECKING:
    from icmlora.fleet.vectors.extraction import ExtractedVectors
    from registry.manifests import Task
    from registry.store import Store

_MEASURED = 3  # tasks after which the duration of the others is estimated
_LONG = 120.0  # seconds


@dataclass(frozen=True)
class ExtractionTakesLong(Event):
    """The vectors of the remaining tasks take minutes or hours; reported once."""

    tasks: int  # that remain
    seconds: float


@dataclass(frozen=True)
class VectorsExtracted(Event):
    """The vectors of one task are stored."""

    TYPE = "vectors"

    task: str
    vectors: int
    source: str  # `samples`, or `probes` for a task without samples
    skipped: str | None = None  # how many rows of its samples were left out and why, in words


@dataclass
class VectorReport(Report[VectorsExtracted]):
    """The results of `extract_vectors`."""

    present: int = 0  # tasks that already had vectors
    changed: list[str] = field(default_factory=list)  # tasks that changed during extraction; nothing was stored


@use_case
def extract_vectors(
    context: Context,
    tasks: Tasks = (),
    *,
    device: Device = "auto",
    again: Annotated[bool, Param("Extract vectors again for tasks that already have them.")] = False,
    workers: Workers = None,
    shard: ShardOf = None,
) -> VectorReport:
    """Extract missing task vectors.

    A task vector holds the base model's hidden states on the task's samples, with and without its adapter. Tasks
    without samples use bundled probe texts. `icm ingest` already does this if the base model is on this machine. If
    any task fails, the exit code is 3.

    Example:
      icm vectors

    Raises:
        BaseModelNotFound: None of the base models is on this machine. Otherwise the report names the missing ones.
        BaseModelMismatch: The only adapter does not fit its base model.
    """
    from icmlora.fleet.resources.workers import check_place, worker_pool  # imports torch
    from icmlora.fleet.vectors.extraction import extract_tasks

    check_place(device, workers)
    report = VectorReport()
    with context.open() as store, reporting(report):
        todo = _plan(store, tasks, Shard.of(shard), again, report)
        failures = FailureLog(context, report, sum(map(len, todo.values())))
        first: tuple[int, float] | None = None  # tasks done and time, once the base model is loaded
        is_estimated = False

        def finished() -> int:
            return len(report.done) + len(report.changed) + len(report.failed)

        def on_progress(note: str) -> None:
            context.progress(finished(), failures.total, note)

        context.progress(0, failures.total)
        with worker_pool(context, store, device=device, workers=workers) as pool:
            for label, of_base in todo.items():
                on_progress(f"loading {label}")
                for task, extracted in failures.results(label, pool.each(extract_tasks, of_base, on_progress)):
                    _record(context, store, task, extracted, report)
                    on_progress(task.name)
                    first = first or (finished(), time.monotonic())
                    done = finished() - first[0]
                    if done >= _MEASURED and not is_estimated:
                        left = failures.total - finished()
                        seconds = left * (time.monotonic() - first[1]) / done
                        if is_estimated := seconds > _LONG:
                            context.on_event(ExtractionTakesLong(left, seconds))
        failures.check(len(todo))
    return report


def _plan(
    store: Store, names: Sequence[str], shard: Shard | None, again: bool, report: VectorReport
) -> dict[str, list[Task]]:
    """Return the tasks to work on by base model, and note the others in the report."""
    todo: defaultdict[str, list[Task]] = defaultdict(list)
    tasks = {task.name: task for task in store.named(names)}.values() if names else store.tasks()
    for task in tasks:
        if shard is not None and not shard.has(task.name):
            continue
        if task.vectors and not again:
            report.present += 1
        elif task.final.is_evicted:
            report.skip("evicted", task.name, "the original was evicted")
        elif task.not_encodable is not None:
            report.skip("original_only", task.name, "the adapter cannot have a code")
        else:
            todo[task.base_model].append(task)
    return todo


def _record(context: Context, store: Store, task: Task, extracted: ExtractedVectors, report: VectorReport) -> None:
    """Store the vectors of a task, unless its adapter or its samples changed during extraction."""
    from icmlora.fleet.vectors.extraction import put_vectors, with_vectors

    vectors = put_vectors(store, extracted.vectors)

    def is_unchanged(present: Task) -> bool:
        return present.final.is_same(task.final) and present.samples == task.samples

    try:
        stored = store.update(
            task.name, lambda present: with_vectors(present, vectors) if is_unchanged(present) else present
        )
    except TaskNotFound:  # `icm rm` does not wait for this
        report.changed.append(task.name)
        return
    if not is_unchanged(stored):
        report.changed.append(task.name)
        return
    if extracted.note is not None and extracted.note not in report.notes:
        report.notes.append(extracted.note)
    report.done.append(VectorsExtracted(task.name, len(vectors), extracted.source, extracted.skipped))
    context.on_event(report.done[-1])
