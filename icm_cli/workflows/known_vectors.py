"""The task vectors of a base model that may be compared with each other. Never imports torch."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from icmlora.vector_file import arrays_from_bytes
from registry.records import Json, TaskRecord, VectorRecord, View

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
        looks: Task -> its vectors, one support set a row: float32, shape (sets, hidden size). By name.
        left_out: The other tasks of the base model.
        extractor: What made them, as JSON with sorted keys; None where there are none.
    """

    looks: dict[str, NDArray[np.float32]]
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
    for vector in store.vectors():
        of_task[vector.task].append(vector)
    rows = {task.name: latest_vectors(of_task[task.name]) for task in tasks}
    sets = {name: [row for row in found if row.view == view] for name, found in rows.items()}
    made_by = {name: canonical(found[0].extractor) for name, found in sets.items() if found}
    # Of two that made equally many, the one of the first task by name: the answer is the same every time.
    common = Counter(made_by[name] for name in sorted(made_by)).most_common(1)
    chosen = made_by.get(like) if like is not None else common[0][0] if common else None
    looks, left_out = {}, []
    for name in sorted(rows):
        if chosen is not None and made_by.get(name) == chosen:
            looks[name] = _read(store, sets[name])
        else:
            left_out.append(LeftOut(name, _reason(rows[name], view, made_by.get(name), chosen)))
    return KnownVectors(looks, tuple(left_out), chosen if looks else None)


def _read(store: Store, rows: Sequence[VectorRecord]) -> NDArray[np.float32]:
    files = {blob: arrays_from_bytes(store.read_blob(blob)) for blob in {row.blob for row in rows}}
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
