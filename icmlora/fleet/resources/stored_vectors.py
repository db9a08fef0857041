"""Read the task vectors of a store that can be compared with each other. Never imports torch.

Vectors can be compared if one extractor made them: the same base model, the same settings, and the same kind of
text (samples of the task, or the bundled probe texts).
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from icmlora.errors import DataError, IcmLoraError
from icmlora.fleet.context import base_name, check_base_model
from icmlora.task_vectors.file import arrays_from_bytes
from registry.errors import DamagedStore
from registry.records import Json, TaskRecord, VectorRecord, View

if TYPE_CHECKING:
    from registry.store import Store


NO_VECTORS = "run `icm vectors` to extract the missing vectors"


@dataclass(frozen=True)
class LeftOut:
    """A task that cannot be compared with the others, and why."""

    task: str
    reason: str
    is_damaged: bool = False  # whether its vectors are in the store, and cannot be read


@dataclass(frozen=True)
class ComparableVectors:
    """Task vectors that one extractor made."""

    # Task -> one row per support set, float32 of shape (support sets, hidden size). Ordered by name.
    vectors: dict[str, NDArray[np.float32]]
    left_out: tuple[LeftOut, ...]
    extractor: str | None = None  # what made them, as JSON with sorted keys; None if there are none


def latest_vectors(rows: Iterable[VectorRecord]) -> list[VectorRecord]:
    """Return, for each view, only the vectors of the extractor that was recorded last: different ones do not mix."""
    ordered = sorted(rows, key=lambda row: row.id)
    extractors = {row.view: row.extractor for row in ordered}
    return [row for row in ordered if row.extractor == extractors[row.view]]


def vectors_by_task(store: Store) -> defaultdict[str, list[VectorRecord]]:
    """Return the rows of all vectors by task."""
    of_task: defaultdict[str, list[VectorRecord]] = defaultdict(list)
    for vector in store.vectors.all():
        of_task[vector.task].append(vector)
    return of_task


def comparable_vectors(
    store: Store, tasks: Sequence[TaskRecord], view: View, like: str | None = None
) -> ComparableVectors:
    """Read the vectors of some tasks that were all made by one extractor."""
    of_task = vectors_by_task(store)
    rows = {task.name: of_task[task.name] for task in tasks}
    store.blobs.fetch(row.blob for own in rows.values() for row in own if row.view == view)
    return comparable(rows, store.blobs.read, view, like)


def comparable(
    of_task: Mapping[str, Sequence[VectorRecord]], read: Callable[[str], bytes], view: View, like: str | None = None
) -> ComparableVectors:
    """Read those of the vectors of some tasks that one extractor made: that of the task `like`, or the most common."""
    rows, others, extractor = rows_to_compare(of_task, view, like)
    vectors, unreadable = read_comparable(read, rows)
    left_out = sorted([*others, *unreadable], key=lambda entry: entry.task)
    return ComparableVectors(vectors, tuple(left_out), extractor if vectors else None)


def rows_to_compare(
    of_task: Mapping[str, Sequence[VectorRecord]], view: View, like: str | None = None
) -> tuple[dict[str, list[VectorRecord]], list[LeftOut], str | None]:
    """Return the rows of `comparable`, by name, the tasks that have none, and what made the vectors of these rows."""
    rows = {name: latest_vectors(found) for name, found in of_task.items()}
    in_view = {name: [row for row in found if row.view == view] for name, found in rows.items()}
    made_by = {name: comparison_key(found[0].extractor) for name, found in in_view.items() if found}
    if like is not None:
        chosen = made_by.get(like)
    else:
        # Counted by name, so that of two extractors with equally many tasks the same one wins every time.
        common = Counter(made_by[name] for name in sorted(made_by)).most_common(1)
        chosen = common[0][0] if common else None
    found, left_out = {}, []
    for name in sorted(rows):
        if chosen is None or made_by.get(name) != chosen:
            left_out.append(LeftOut(name, _reason(rows[name], view, made_by.get(name), chosen)))
        else:
            found[name] = in_view[name]
    return found, left_out, chosen


def read_comparable(
    read: Callable[[str], bytes], rows: Mapping[str, Sequence[VectorRecord]]
) -> tuple[dict[str, NDArray[np.float32]], list[LeftOut]]:
    """Read the vectors of tasks, one row of an array for each of theirs, without the tasks whose files are damaged."""
    vectors, left_out = {}, []
    for name, own in rows.items():
        try:
            vectors[name] = np.stack(read_vectors(read, own))
        except (DamagedStore, IcmLoraError) as error:
            left_out.append(LeftOut(name, f"its vectors cannot be read: {error.message}", is_damaged=True))
    return vectors, left_out


def tasks_of_one_base(store: Store, base_model: str | None) -> tuple[str, Sequence[TaskRecord]]:
    """Return the chosen base model, or the only one with vectors, and its tasks; raises `DataError` without one."""
    by_base: defaultdict[str, list[TaskRecord]] = defaultdict(list)
    has_vectors: defaultdict[str, bool] = defaultdict(bool)
    for row in store.tasks.summaries():
        by_base[row.task.base_model].append(row.task)
        has_vectors[row.task.base_model] |= row.vectors > 0
    base_model = base_name(store, base_model)
    if base_model is not None:
        check_base_model(base_model, by_base)
        return base_model, by_base[base_model]
    ready = sorted(base for base, has in has_vectors.items() if has)
    if len(ready) > 1:
        fact = f"only vectors of one base model can be compared, but {len(ready)} have vectors: {', '.join(ready)}"
        raise DataError(fact, hint="choose one with --base-model NAME")
    if not ready:
        raise DataError("no task has vectors", hint=NO_VECTORS)
    return ready[0], by_base[ready[0]]


def comparison_key(extractor: Json) -> str:
    """Return an extractor as text, equal for those whose vectors may be compared.

    The chat template does not count: a task of plain text and one of chats are both read as they were trained.
    """
    return json.dumps({name: value for name, value in extractor.items() if name != "template"}, sort_keys=True)


def read_vectors(read: Callable[[str], bytes], rows: Sequence[VectorRecord]) -> list[NDArray[np.float32]]:
    """Read vectors, each of shape (hidden,); a file holds all of one extraction, so each is read once.

    Raises:
        DataError: A file does not hold vectors.
        DamagedStore: Its bytes are missing or damaged.
    """
    views = {row.view for row in rows}
    files = {blob: arrays_from_bytes(read(blob), views) for blob in {row.blob for row in rows}}
    return [files[row.blob][row.view][row.support_set] for row in rows]


def _reason(rows: Sequence[VectorRecord], view: View, made_by: str | None, chosen: str | None) -> str:
    if not rows:
        return "no vectors"
    if made_by is None or chosen is None:
        return f"no vectors of the {view} view, which needs samples"
    own, others = json.loads(made_by), json.loads(chosen)
    if own.get("source") != others.get("source"):
        return f"made from {_texts_of(own)}, but the others were made from {_texts_of(others)}"
    if own.get("base") != others.get("base"):
        return "made with another copy of the base model"
    if own.get("dtype") != others.get("dtype"):
        return f"made with the base model in {own.get('dtype')}, the others in {others.get('dtype')}"
    return "made by another version of icm, or with other settings"


def _texts_of(extractor: dict[str, object]) -> str:
    return "probe texts" if extractor.get("source") == "probes" else "samples"
