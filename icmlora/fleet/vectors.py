"""The task vectors of a base model that may be compared with each other. Never imports torch.

Extract the task vectors that are missing: run the base model, with and without each adapter, over its samples.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter, defaultdict
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from icmlora.base_models.causal_lm import BaseModel, check_fits
from icmlora.errors import BaseModelNotFound
from icmlora.fleet.context import Context, Event, Progress, StopFlag, sample_texts
from icmlora.fleet.loading import open_base, write_plain_copy
from icmlora.io.devices import resolve_device
from icmlora.task_vectors.extraction import extract_adapted, extract_context
from icmlora.task_vectors.file import arrays_from_bytes, vectors_to_bytes
from icmlora.task_vectors.vector import TaskVector
from registry.errors import CodeChanged, TaskNotFound
from registry.records import Json, NewVector, TaskRecord, TaskSummary, VectorRecord, View

if TYPE_CHECKING:
    from registry.store import Store


@dataclass(frozen=True)
class LeftOut:
    """A task without vectors that could be compared, and why."""

    task: str
    reason: str


@dataclass(frozen=True)
class KnownVectors:
    """Task vectors that one extractor made.

    Attributes:
        vectors: Task -> its vectors, one support set a row: float32, shape (sets, hidden size). By name.
        left_out: The other tasks of the base model.
        extractor: What made them, as JSON with sorted keys; None where there are none.
    """

    vectors: dict[str, NDArray[np.float32]]
    left_out: tuple[LeftOut, ...]
    extractor: str | None = None


def latest_vectors(rows: Iterable[VectorRecord]) -> list[VectorRecord]:
    """Return the vectors of the last recorded extractor of each view: those of different extractors do not mix."""
    ordered = sorted(rows, key=lambda row: row.id)
    extractors = {row.view: row.extractor for row in ordered}
    return [row for row in ordered if row.extractor == extractors[row.view]]


def comparable_vectors(store: Store, tasks: Sequence[TaskRecord], view: View, like: str | None = None) -> KnownVectors:
    """Read the vectors of tasks, as far as one extractor made them.

    Args:
        store: The open store.
        tasks: Tasks of one base model.
        view: Which vectors.
        like: Name of the task whose extractor counts; None for the one that made most tasks' vectors.

    Raises:
        DamagedStore: Bytes that are not those that were stored.
        DataError: Bytes that are no task vectors.
    """
    of_task: defaultdict[str, list[VectorRecord]] = defaultdict(list)
    for vector in store.vectors.all():
        of_task[vector.task].append(vector)
    rows = {task.name: latest_vectors(of_task[task.name]) for task in tasks}
    sets = {name: [row for row in found if row.view == view] for name, found in rows.items()}
    made_by = {name: canonical(found[0].extractor) for name, found in sets.items() if found}
    # Of two that made equally many, the one of the first task by name: the answer is the same every time.
    common = Counter(made_by[name] for name in sorted(made_by)).most_common(1)
    chosen = made_by.get(like) if like is not None else common[0][0] if common else None
    vectors, left_out = {}, []
    for name in sorted(rows):
        if chosen is not None and made_by.get(name) == chosen:
            vectors[name] = _read(store, sets[name])
        else:
            left_out.append(LeftOut(name, _reason(rows[name], view, made_by.get(name), chosen)))
    return KnownVectors(vectors, tuple(left_out), chosen if vectors else None)


def _read(store: Store, rows: Sequence[VectorRecord]) -> NDArray[np.float32]:
    files = {blob: arrays_from_bytes(store.blobs.read(blob)) for blob in {row.blob for row in rows}}
    return np.stack([files[row.blob][row.view][row.support_set] for row in rows])


def canonical(extractor: Json) -> str:
    """Return an extractor as text that is equal for equal ones."""
    return json.dumps(extractor, sort_keys=True)


def _reason(rows: Sequence[VectorRecord], view: View, made_by: str | None, chosen: str | None) -> str:
    if not rows:
        return "no vectors"
    if made_by is None or chosen is None:
        return f"no vectors of the {view} view, which needs samples"
    own, others = json.loads(made_by), json.loads(chosen)
    if own.get("source") != others.get("source"):
        return f"read through {_source(own)}, where the others were read through {_source(others)}"
    if own.get("base") != others.get("base"):
        return "read by another copy of the base model"
    return "read by another icm, or with other settings"


def _source(extractor: dict[str, object]) -> str:
    return "probe texts" if extractor.get("source") == "probes" else "samples"


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
    context: Context, names: Sequence[str], *, device: str, again: bool, stop: StopFlag
) -> Generator[Event, None, VectorReport]:
    """Extract and store task vectors, task by task; what is stored stays, whatever ends the work.

    A base model that is missing keeps nobody from the tasks of the others; it is raised after them.

    Args:
        context: The store.
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
    with context.open() as store:
        wanted = {store.tasks.get(name).name for name in names}
        rows = [row for row in store.tasks.summaries() if not wanted or row.task.name in wanted]
        todo: defaultdict[str, list[TaskSummary]] = defaultdict(list)
        for row in rows:
            if row.vectors and not again:
                report.present += 1
            elif row.final.is_evicted:
                report.evicted.append(row.task.name)
            else:
                todo[row.task.base_model].append(row)
        total = sum(map(len, todo.values()))
        yield Progress(0, total)
        missing: BaseModelNotFound | None = None
        for label, tasks in todo.items():
            yield Progress(len(report.tasks) + len(report.changed), total, f"loading {label}")
            try:
                # bfloat16 moves a vector by less than a hundredth of what another support set does: twice as fast.
                base = open_base(store, label, chosen, VECTOR_DTYPE, cache=context.cache)
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
                yield Progress(len(report.tasks) + len(report.changed), total, row.task.name)
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
        store.vectors.add(put_vectors(store, row.task.name, vectors), of=row)
    except (TaskNotFound, CodeChanged):
        return None
    return Extracted(row.task.name, len(vectors), "probes" if samples is None else "samples")


def put_vectors(store: Store, task: str, vectors: Sequence[TaskVector]) -> list[NewVector]:
    """Store the vectors of a task as one file, and return the rows that are to be recorded."""
    sets: defaultdict[View, list[torch.Tensor]] = defaultdict(list)
    for vector in vectors:
        sets[vector.view].append(vector.values)
    blob = store.blobs.put(vectors_to_bytes({view: torch.stack(values) for view, values in sets.items()}))
    return [_row(task, vector, blob) for vector in vectors]


def _row(task: str, vector: TaskVector, blob: str) -> NewVector:
    extractor = json.loads(vector.extractor.to_json())
    return NewVector(task, vector.view, vector.support_set, extractor, blob, vector.values.numel())
