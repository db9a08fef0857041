"""Read the task vectors of a store that can be compared with each other. Never imports torch.

Vectors can be compared if one extractor made them: the same base model, the same settings, and the same kind of
text (samples of the task, or the bundled probe texts).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from icmlora.errors import DataError, IcmLoraError
from icmlora.fleet.context import check_base_model
from icmlora.task_vectors.file import arrays_from_bytes
from registry.errors import DamagedStore
from registry.filters import Selection
from registry.manifests import Json, Task, Vector, View

if TYPE_CHECKING:
    from registry.store import Store


NO_VECTORS = "run `icm vectors` to extract the missing vectors"


@dataclass(frozen=True)
class LeftOut:
    """A task that cannot be compared with the others."""

    task: str
    reason: str
    is_damaged: bool = False  # whether its stored vectors cannot be read


@dataclass(frozen=True)
class ComparableVectors:
    """Task vectors that one extractor made."""

    # Task -> one row per support set, float32 of shape (support sets, hidden size). Ordered by name.
    vectors: dict[str, NDArray[np.float32]]
    left_out: tuple[LeftOut, ...]
    extractor: str | None = None  # as JSON with sorted keys; None if there are no vectors


def latest_vectors(vectors: Iterable[Vector]) -> list[Vector]:
    """Return, for each view, only the vectors of the extractor that was recorded last: different ones do not mix."""
    vectors = list(vectors)
    extractors = {vector.view: vector.extractor for vector in vectors}
    return [vector for vector in vectors if vector.extractor == extractors[vector.view]]


def comparable_vectors(store: Store, tasks: Iterable[Task], view: View, like: str | None = None) -> ComparableVectors:
    """Read the vectors of some tasks that were all made by one extractor."""
    vectors = {task.name: task.vectors for task in tasks}
    store.blobs.fetch(vector.blob for own in vectors.values() for vector in own if vector.view == view)
    return comparable(vectors, store.blobs.read, view, like)


def comparable(
    of_task: Mapping[str, Sequence[Vector]], read: Callable[[str], bytes], view: View, like: str | None = None
) -> ComparableVectors:
    """Read the vectors of some tasks that one extractor made: the extractor of the task `like`, or the most common."""
    latest = {name: latest_vectors(vectors) for name, vectors in of_task.items()}
    in_view = {name: [vector for vector in vectors if vector.view == view] for name, vectors in latest.items()}
    made_by = {name: comparison_key(vectors[0].extractor) for name, vectors in in_view.items() if vectors}
    # Counted by name, so that of two extractors with equally many tasks the same one wins every time.
    common = Counter(made_by[name] for name in sorted(made_by)).most_common(1)
    chosen = made_by.get(like) if like is not None else common[0][0] if common else None
    found, others = {}, []
    for name in sorted(latest):
        if chosen is None or made_by.get(name) != chosen:
            others.append(LeftOut(name, _reason(latest[name], view, made_by.get(name), chosen)))
        else:
            found[name] = in_view[name]
    vectors, unreadable = read_comparable(read, found)
    left_out = sorted([*others, *unreadable], key=lambda entry: entry.task)
    return ComparableVectors(vectors, tuple(left_out), chosen if vectors else None)


def read_comparable(
    read: Callable[[str], bytes], of_task: Mapping[str, Sequence[Vector]]
) -> tuple[dict[str, NDArray[np.float32]], list[LeftOut]]:
    """Read the vectors of tasks, one array row per vector, without the tasks whose files are damaged."""
    vectors, left_out = {}, []
    for name, own in of_task.items():
        try:
            vectors[name] = np.stack(read_vectors(read, own))
        except (DamagedStore, IcmLoraError) as error:
            left_out.append(LeftOut(name, f"its vectors cannot be read: {error.message}", is_damaged=True))
    return vectors, left_out


def tasks_of_one_base(store: Store, base_model: str | None) -> tuple[str, Iterator[Task]]:
    """Return a base model, by default the only one with vectors, and its tasks; raise `DataError` without one."""
    if base_model is None:
        ready = sorted({row.base for row in store.rows() if row.vectors})
        if len(ready) > 1:
            fact = f"only vectors of one base model can be compared, but {len(ready)} have vectors: {', '.join(ready)}"
            raise DataError(fact, hint="choose one with --base-model NAME")
        if not ready:
            raise DataError("no task has vectors", hint=NO_VECTORS)
        base_model = ready[0]
    else:
        base_model = store.base_name(base_model)
        check_base_model(base_model, store.task_counts())
    return base_model, store.tasks(Selection(base_model=base_model))


def comparison_key(extractor: Json) -> str:
    """Return an extractor as text; vectors with equal texts may be compared.

    The chat template does not count: a task of plain text and one of chats are both read as they were trained.
    """
    return json.dumps({name: value for name, value in extractor.items() if name != "template"}, sort_keys=True)


def read_vectors(read: Callable[[str], bytes], vectors: Sequence[Vector]) -> list[NDArray[np.float32]]:
    """Read vectors, each of shape (hidden,); a file holds all of one extraction, so each is read once.

    Raises:
        DataError: A file does not hold vectors.
        DamagedStore: Its bytes are missing or damaged.
    """
    views = {vector.view for vector in vectors}
    files = {blob: arrays_from_bytes(read(blob), views) for blob in {vector.blob for vector in vectors}}
    return [files[vector.blob][vector.view][vector.support_set] for vector in vectors]


def _reason(vectors: Sequence[Vector], view: View, made_by: str | None, chosen: str | None) -> str:
    if not vectors:
        return "no vectors"
    if made_by is None or chosen is None:
        return f"no vectors of the {view} view, which needs samples"
    own, others = json.loads(made_by), json.loads(chosen)
    if own.get("source") != others.get("source"):
        one, other = ("probe texts" if made.get("source") == "probes" else "samples" for made in (own, others))
        return f"made from {one}, but the others were made from {other}"
    if own.get("base") != others.get("base"):
        return "made with another copy of the base model"
    if own.get("dtype") != others.get("dtype"):
        return f"made with the base model in {own.get('dtype')}, the others in {others.get('dtype')}"
    return "made by another version of icm, or with other settings"
