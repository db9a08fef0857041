"""Extract the task vectors that are missing: run the base model, with and without each adapter, over its samples."""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from icm_cli.workflows.base_access import open_base
from icm_cli.workflows.chosen import sample_texts
from icm_cli.workflows.events import Event, Step, StopFlag
from icm_cli.workflows.opening import Place
from icm_cli.workflows.plain_copy import write_plain_copy
from icmlora.base_model import BaseModel, check_fits
from icmlora.device import resolve_device
from icmlora.errors import BaseModelNotFound
from icmlora.task_vector import TaskVector, View
from icmlora.vector_extraction import extract_adapted, extract_context
from icmlora.vector_file import vectors_to_bytes
from registry.errors import CodeChanged, TaskNotFound
from registry.records import NewVector, TaskSummary

if TYPE_CHECKING:
    from registry.store import Store

VECTOR_DTYPE = torch.bfloat16
"""Precision of the base model that vectors are made with, on every device: others cannot be compared with them."""


@dataclass(frozen=True)
class Extracted(Event):
    """The vectors of one task are stored."""

    task: str
    vectors: int
    source: str
    """`samples`, or `probes` where the task has none."""


@dataclass
class VectorReport:
    """What an extraction did."""

    tasks: list[Extracted] = field(default_factory=list)
    present: int = 0
    """Tasks that had their vectors already."""
    evicted: list[str] = field(default_factory=list)
    """Tasks that lack vectors, or were to get new ones, and whose original is gone."""
    changed: list[str] = field(default_factory=list)
    """Tasks that got another adapter or other samples while theirs were read: nothing was stored."""
    stopped: bool = False


def extract_missing(
    place: Place, names: Sequence[str], *, device: str, again: bool, stop: StopFlag
) -> Generator[Event, None, VectorReport]:
    """Extract and store task vectors, task by task; what is stored stays, whatever ends the work.

    A base model that is missing keeps nobody from the tasks of the others; it is raised after them.

    Args:
        place: The store.
        names: Tasks; all if empty.
        device: As `--device` takes it.
        again: Also for tasks that have vectors.
        stop: Looked at between tasks.

    Raises:
        DeviceUnavailable: The device is not there; nothing was opened.
        BaseModelNotFound: A base model is not on this machine.
        BaseModelMismatch: An adapter does not fit its base model.
        TaskNotFound: A name is not in the store.
    """
    chosen = resolve_device(device)
    report = VectorReport()
    with place.open() as store:
        wanted = {store.task(name).name for name in names}
        rows = [row for row in store.summaries() if not wanted or row.task.name in wanted]
        todo: defaultdict[str, list[TaskSummary]] = defaultdict(list)
        for row in rows:
            if row.vectors and not again:
                report.present += 1
            elif row.final.is_evicted:
                report.evicted.append(row.task.name)
            else:
                todo[row.task.base_model].append(row)
        total = sum(map(len, todo.values()))
        yield Step(0, total)
        missing: BaseModelNotFound | None = None
        for label, tasks in todo.items():
            yield Step(len(report.tasks) + len(report.changed), total, f"loading {label}")
            try:
                # bfloat16 moves a vector by less than a hundredth of what another support set does: twice as fast.
                base = open_base(store, label, chosen, VECTOR_DTYPE)
            except BaseModelNotFound as error:
                missing = missing or error
                continue
            for row in tasks:
                if stop.requested:
                    report.stopped = True
                    return report
                done = _extract(store, base, row)
                if done is None:
                    report.changed.append(row.task.name)
                else:
                    report.tasks.append(done)
                    yield done
                yield Step(len(report.tasks) + len(report.changed), total, row.task.name)
    if missing is not None:
        raise missing
    return report


def _extract(store: Store, base: BaseModel, row: TaskSummary) -> Extracted | None:
    """Extract and store the vectors of one task; None where the task is another one by now."""
    check_fits(base, row.final.layout)
    samples = sample_texts(store, row.task)
    with tempfile.TemporaryDirectory(prefix="icm-") as folder:
        adapter = Path(folder) / "adapter"
        write_plain_copy(store, row.final, adapter)
        vectors = extract_adapted(base, adapter, samples)
    if samples is not None:
        vectors += extract_context(base, samples)
    try:
        store.add_vectors(put_vectors(store, row.task.name, vectors), of=row)
    except (TaskNotFound, CodeChanged):
        return None
    return Extracted(row.task.name, len(vectors), "probes" if samples is None else "samples")


def put_vectors(store: Store, task: str, vectors: Sequence[TaskVector]) -> list[NewVector]:
    """Store the vectors of a task as one file, and return the rows that are to be recorded."""
    sets: defaultdict[View, list[torch.Tensor]] = defaultdict(list)
    for vector in vectors:
        sets[vector.view].append(vector.values)
    blob = store.put_blob(vectors_to_bytes({view: torch.stack(values) for view, values in sets.items()}))
    return [_row(task, vector, blob) for vector in vectors]


def _row(task: str, vector: TaskVector, blob: str) -> NewVector:
    extractor = json.loads(vector.extractor.to_json())
    return NewVector(task, vector.view, vector.support_set, extractor, blob, vector.values.numel())
