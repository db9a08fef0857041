"""Extract task vectors: run the base model over samples of each task, with and without the task's adapter."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from icmlora.base_models.modality import BaseModel
from icmlora.errors import BaseModelNotFound, BaseModelUnsuited, Cancelled
from icmlora.fleet.context import Context, Event, TaskFailed, reporting
from icmlora.fleet.failures import FAILURES, BaseModelLeftOut, as_error
from icmlora.fleet.loading import open_base, read_runnable
from icmlora.fleet.texts import read_samples
from icmlora.io.devices import resolve_device
from icmlora.task_vectors.extraction import extract_adapted, extract_context
from icmlora.task_vectors.file import vectors_to_bytes
from icmlora.task_vectors.vector import TaskVector, VectorSettings
from registry.records import NewVector, TaskSummary, View

if TYPE_CHECKING:
    from registry.store import Store

VECTOR_DTYPE = torch.bfloat16
"""Precision of the base model, on every device: vectors made in another precision cannot be compared.

bfloat16 is twice as fast as float32 and moves a vector by less than a hundredth of what another support set does.
"""

SAMPLES_READ = VectorSettings().support_sets * VectorSettings().set_size
"""Samples that vectors are made from: what `split_samples` chooses of a whole file, it also chooses of these."""


@dataclass(frozen=True)
class VectorRequest:
    """What to extract."""

    names: Sequence[str] = ()
    device: str = "auto"
    again: bool = False


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


def extract_vectors(context: Context, request: VectorRequest) -> VectorReport:
    """Extract and store task vectors, one task after the other; what is stored stays, and a failure is reported.

    Raises:
        BaseModelNotFound: None of the base models is on this machine.
    """
    device = resolve_device(request.device)
    report = VectorReport()
    with context.open() as store, reporting(report):
        todo = _plan(store, request, report)
        total = sum(map(len, todo.values()))
        context.progress(0, total)
        missing: list[BaseModelNotFound] = []
        for label, tasks in todo.items():
            context.progress(report.done, total, f"loading {label}")
            try:
                base = open_base(store, label, device, VECTOR_DTYPE, cache=context.cache)
            except (BaseModelNotFound, BaseModelUnsuited) as error:
                missing += [error] if isinstance(error, BaseModelNotFound) else []
                names = [task.task.name for task in tasks]
                report.left_out.append(BaseModelLeftOut.because_of(label, names, error))
                continue
            for task in tasks:
                try:
                    extracted = _extract(store, base, task, report)
                except Cancelled:
                    raise
                except FAILURES as error:
                    if total == 1:  # there are no others that could go on
                        raise as_error(error) from error
                    report.failed.append(TaskFailed.of(task.task.name, as_error(error)))
                    context.on_event(report.failed[-1])
                    continue
                if extracted is None:
                    report.changed.append(task.task.name)
                else:
                    report.tasks.append(extracted)
                    context.on_event(extracted)
                context.progress(report.done, total, task.task.name)
    if missing and len(missing) == len(todo):
        raise missing[0]
    return report


def _plan(store: Store, request: VectorRequest, report: VectorReport) -> dict[str, list[TaskSummary]]:
    """Return the tasks to work on by base model, and note the others in the report."""
    wanted = {store.tasks.get(name).name for name in request.names}
    todo: defaultdict[str, list[TaskSummary]] = defaultdict(list)
    for row in store.tasks.summaries():
        if wanted and row.task.name not in wanted:
            continue
        if row.vectors and not request.again:
            report.present += 1
        elif row.final.is_evicted:
            report.evicted.append(row.task.name)
        elif row.final.original_only is not None:
            report.original_only.append(row.task.name)
        else:
            todo[row.task.base_model].append(row)
    return todo


def _extract(store: Store, base: BaseModel, row: TaskSummary, report: VectorReport) -> VectorsExtracted | None:
    """Extract and store the vectors of one task; return None if the task changed in the meantime."""
    samples = read_samples(store, row.task, base, most=SAMPLES_READ)
    items, template = (None, None) if samples is None else (samples.items, samples.template)
    vectors = extract_adapted(base, read_runnable(store, row.final), items, template=template)
    if items is not None:
        vectors += extract_context(base, items, template=template)
    if store.vectors.add(put_vectors(store, row.task.name, vectors), of=row) is None:
        return None
    if samples is None:
        return VectorsExtracted(row.task.name, len(vectors), "probes")
    if samples.note is not None and samples.note not in report.notes:
        report.notes.append(samples.note)
    return VectorsExtracted(row.task.name, len(vectors), "samples", samples.summary)


def put_vectors(store: Store, task: str, vectors: Sequence[TaskVector]) -> list[NewVector]:
    """Store the vectors of a task as one file and return the rows to record."""
    by_view: defaultdict[View, list[torch.Tensor]] = defaultdict(list)
    for vector in vectors:
        by_view[vector.view].append(vector.values)
    blob = store.blobs.put(vectors_to_bytes({view: torch.stack(values) for view, values in by_view.items()}))
    return [_row(task, vector, blob) for vector in vectors]


def _row(task: str, vector: TaskVector, blob: str) -> NewVector:
    extractor = json.loads(vector.extractor.to_json())
    return NewVector(task, vector.view, vector.support_set, extractor, blob, vector.values.numel())
