"""Extract task vectors: run the base model over samples of each task, with and without the task's adapter."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

import torch

from icmlora.base_models.modality import BaseModel
from icmlora.errors import BaseModelNotFound, BaseModelUnsuited
from icmlora.fleet.context import Context, Event, Shard, TaskFailed, reporting, use_case
from icmlora.fleet.failures import FAILURES, BaseModelLeftOut, BaseUnavailable, Failed, FailureLog, as_error
from icmlora.fleet.resources.loading import Models, read_runnable
from icmlora.fleet.resources.texts import read_samples
from icmlora.fleet.resources.workers import Tell, check_place, worker_pool
from icmlora.task_vectors.extraction import extract_adapted, extract_context
from icmlora.task_vectors.file import vectors_to_bytes
from icmlora.task_vectors.vector import TaskVector, VectorSettings
from registry.errors import TaskNotFound
from registry.manifests import File, Task, Vector, View

if TYPE_CHECKING:
    from registry.store import Store

VECTOR_DTYPE = torch.bfloat16
"""Precision of the base model, on every device: vectors made in another precision cannot be compared.

bfloat16 is twice as fast as float32 and moves a vector by less than a hundredth of what another support set does.
"""

SAMPLES_READ = VectorSettings().support_sets * VectorSettings().set_size
"""Samples that vectors are made from: what `split_samples` chooses of a whole file, it also chooses of these."""

_MEASURED = 3  # tasks after which the duration of the others is estimated
_LONG = 120.0  # seconds


@dataclass(frozen=True)
class ExtractionTakesLong(Event):
    """The vectors of the remaining tasks take minutes or hours, as the first ones show; this is reported once."""

    tasks: int  # that remain
    seconds: float


@dataclass(frozen=True)
class VectorsExtracted(Event):
    """The vectors of one task are stored."""

    task: str
    vectors: int
    source: str  # `samples`, or `probes` for a task without samples
    skipped: str | None = None  # how many rows of its samples were left out and why, in words


@dataclass
class VectorReport:
    """What an extraction did."""

    tasks: list[VectorsExtracted] = field(default_factory=list)
    present: int = 0
    original_only: list[str] = field(default_factory=list)  # tasks whose adapters no code can represent
    evicted: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    failed: list[TaskFailed] = field(default_factory=list)
    left_out: list[BaseModelLeftOut] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def done(self) -> int:
        """Tasks that need no more work."""
        return len(self.tasks) + len(self.changed) + len(self.failed)


@use_case
def extract_vectors(
    context: Context,
    tasks: Sequence[str] = (),
    *,
    device: str = "auto",
    again: bool = False,
    workers: str | None = None,
    shard: str | None = None,
) -> VectorReport:
    """Extract and store task vectors: the base model's hidden states on samples, with and without the adapter.

    Args:
        context: The store.
        tasks: Names of tasks; all by default.
        device: Where to compute.
        again: Also extract the vectors of tasks that already have some.
        workers: Where to compute, as described for the class.
        shard: Which part of the tasks to work on, as described for the class.

    Raises:
        BaseModelNotFound: None of the base models is on this machine. The report names those that are missing.
        BaseModelMismatch: An adapter does not fit its base model.
    """
    check_place(device, workers)
    report = VectorReport()
    with context.open() as store, reporting(report):
        todo = _plan(store, tasks, Shard.of(shard), again, report)
        failures = FailureLog(context, report, sum(map(len, todo.values())))
        context.progress(0, failures.total)
        pace = _Pace(context, failures.total)

        def tell(note: str) -> None:
            context.progress(report.done, failures.total, note)

        with worker_pool(context, store, device=device, workers=workers) as pool:
            for label, of_base in todo.items():
                tell(f"loading {label}")
                for task, extracted in failures.results(label, pool.each(extract_tasks, of_base, tell)):
                    _record(context, store, task, extracted, report)
                    tell(task.name)
                    pace.note(report.done)
        failures.check(len(todo))
    return report


class _Pace:
    """Estimates how long the remaining tasks take."""

    def __init__(self, context: Context, total: int) -> None:
        self._context, self._total = context, total
        self._first: tuple[int, float] | None = None
        self._is_told = False

    def note(self, done: int) -> None:
        """Note the number of finished tasks."""
        now = time.monotonic()
        if self._first is None:  # the base model is loaded
            self._first = done, now
        if self._is_told or done < self._first[0] + _MEASURED:
            return
        left = self._total - done
        seconds = left * (now - self._first[1]) / (done - self._first[0])
        if seconds > _LONG:
            self._is_told = True
            self._context.on_event(ExtractionTakesLong(left, seconds))


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
            report.evicted.append(task.name)
        elif task.not_encodable is not None:
            report.original_only.append(task.name)
        else:
            todo[task.base_model].append(task)
    return todo


@dataclass(frozen=True)
class _Extracted:
    """The vectors of one task, before they are stored."""

    vectors: Sequence[TaskVector]
    source: Literal["samples", "probes"]
    skipped: str | None = None
    note: str | None = None  # printed once for all tasks


def extract_tasks(
    models: Models, tasks: Sequence[Task], tell: Tell
) -> Iterator[tuple[Task, _Extracted | Failed | BaseUnavailable]]:
    """Extract the vectors of each task of one base model."""
    for task in tasks:
        try:
            result: _Extracted | Failed | BaseUnavailable = _extracted(
                models.store, task, models.base(task.base_model, VECTOR_DTYPE)
            )
        except (BaseModelNotFound, BaseModelUnsuited) as error:
            result = BaseUnavailable(error)
        except FAILURES as error:
            result = Failed(as_error(error, models.loaded(task.base_model)))
        yield task, result


def _extracted(store: Store, task: Task, base: BaseModel) -> _Extracted:
    samples = read_samples(store, task, base, most=SAMPLES_READ)
    items, template = (None, None) if samples is None else (samples.items, samples.template)
    vectors = extract_adapted(base, read_runnable(store, task.final), items, template=template)
    if samples is None:
        return _Extracted(vectors, "probes")
    vectors += extract_context(base, samples.items, template=template)
    return _Extracted(vectors, "samples", samples.summary, samples.note)


def _record(context: Context, store: Store, task: Task, extracted: _Extracted, report: VectorReport) -> None:
    """Store the vectors of a task, unless its adapter or its samples changed during extraction."""
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
    report.tasks.append(VectorsExtracted(task.name, len(vectors), extracted.source, extracted.skipped))
    context.on_event(report.tasks[-1])


def with_vectors(task: Task, new: Sequence[Vector]) -> Task:
    """Return a task with new vectors, which replace its vectors of the same views."""
    views = {vector.view for vector in new}
    return replace(task, vectors=(*(vector for vector in task.vectors if vector.view not in views), *new))


def put_vectors(store: Store, vectors: Sequence[TaskVector]) -> tuple[Vector, ...]:
    """Store the vectors of a task as one blob and return their descriptions."""
    by_view: defaultdict[View, list[torch.Tensor]] = defaultdict(list)
    for vector in vectors:
        by_view[vector.view].append(vector.values)
    data = vectors_to_bytes({view: torch.stack(values) for view, values in by_view.items()})
    blob = File(store.blobs.put(data), len(data))
    return tuple(
        Vector(
            view=vector.view,
            support_set=vector.support_set,
            blob=blob,
            dim=vector.values.numel(),
            extractor=json.loads(vector.extractor.to_json()),
        )
        for vector in vectors
    )
