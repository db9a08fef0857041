"""The map of the tasks of a base model, and the nearest tasks of one task. Never imports torch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from heapq import nsmallest
from typing import TYPE_CHECKING

from icmlora.errors import DataError, IcmLoraError
from icmlora.fleet.context import Context
from icmlora.fleet.map.known_means import known_means
from icmlora.fleet.resources.stored_vectors import NO_VECTORS, LeftOut, comparable_vectors
from icmlora.task_vectors.distances import MIN_TASKS, Neighbour, distances_from
from icmlora.task_vectors.map import TaskMap, map_tasks
from registry.errors import DamagedStore
from registry.manifests import Task, View

if TYPE_CHECKING:
    from registry.store import Store

_NEAREST = 5
_VIEWS: tuple[View, ...] = ("adapted", "context")


@dataclass(frozen=True)
class MapReport:
    """The map of one base model's tasks."""

    base_model: str
    view: View
    map: TaskMap
    support_sets: int
    left_out: tuple[LeftOut, ...]

    @property
    def reasons(self) -> list[str]:
        """A line for each reason why tasks are not on the map, with their names."""
        return _grouped(self.left_out)


def map_of(store: Store, base_model: str, tasks: Iterable[Task], view: View, clusters: int | None = None) -> MapReport:
    """Make the map of a base model's tasks in an open store.

    Raises:
        DataError: Too few tasks have comparable vectors, or there are fewer tasks than clusters.
    """
    known = comparable_vectors(store, tasks, view)
    if len(known.vectors) < MIN_TASKS:
        fact = f"a map needs {MIN_TASKS} tasks of {base_model} with comparable vectors of the {view} view"
        have = f"there {'is' if len(known.vectors) == 1 else 'are'} {len(known.vectors)}"
        raise DataError("; ".join([f"{fact}, but {have}", *_grouped(known.left_out)]), hint=NO_VECTORS)
    if clusters is not None and clusters > len(known.vectors):
        fact = f"{len(known.vectors)} tasks cannot make {clusters} clusters"
        raise DataError(fact, hint="use `--clusters auto` for the best silhouette")
    return MapReport(
        base_model=base_model,
        view=view,
        map=map_tasks(known.vectors, clusters),
        support_sets=sum(len(vectors) for vectors in known.vectors.values()),
        left_out=known.left_out,
    )


def nearest_tasks(context: Context, store: Store, task: Task) -> tuple[Neighbour, ...]:
    """Return the tasks with the nearest vectors, at most five; none if too few can be compared."""
    for view in _VIEWS:
        # A generated task has vectors of the context view only. Damaged vectors are left to `icm verify`.
        try:
            known = known_means(context, store, task, view)
        except (DamagedStore, IcmLoraError):
            return ()
        if known is not None:
            if len(known.names) < MIN_TASKS:
                return ()
            distances = distances_from(known.names.index(task.name), known.vectors)
            others = (found for found in zip(distances.tolist(), known.names, strict=True) if found[1] != task.name)
            return tuple(Neighbour(name, distance) for distance, name in nsmallest(_NEAREST, others))
    return ()


def _grouped(left_out: Sequence[LeftOut]) -> list[str]:
    names: defaultdict[str, list[str]] = defaultdict(list)
    for entry in left_out:
        names[entry.reason].append(entry.task)
    return [f"{reason}: {', '.join(tasks)}" for reason, tasks in names.items()]
