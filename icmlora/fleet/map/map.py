"""Compare tasks by their vectors: the map of a base model, and the nearest tasks of one task. Never imports torch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from heapq import nsmallest
from pathlib import Path
from typing import TYPE_CHECKING

from icmlora.errors import DataError, IcmLoraError
from icmlora.fleet.context import Context, use_case
from icmlora.fleet.map.known_means import known_means
from icmlora.fleet.resources.stored_vectors import NO_VECTORS, LeftOut, comparable_vectors, tasks_of_one_base
from icmlora.io.staging import check_absent, writing_file
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


@use_case
def map_fleet(
    context: Context,
    *,
    view: View = "adapted",
    base_model: str | None = None,
    clusters: int | None = None,
    plot: str | Path | None = None,
    force: bool = False,
) -> MapReport:
    """Compare the tasks of a base model by their vectors, and cluster them.

    Args:
        context: The store.
        view: Which vectors: `adapted` (the base model with the adapter) or `context` (the base model alone).
        base_model: Which base model; needed only if tasks of several have vectors.
        clusters: How many clusters; by default the number with the best mean silhouette.
        plot: Also draw the map to this .svg file, completely or not at all.
        force: Replace the file if it exists.

    Raises:
        DataError: Too few tasks have comparable vectors, there are fewer tasks than clusters, or the plot is not
            an .svg file.
        OutputExists: The file exists and `force` is not given.
    """
    picture = None if plot is None else Path(plot)
    if picture is not None:
        if picture.suffix.lower() != ".svg":
            raise DataError("a map must be an .svg file", path=picture, hint="use a file name that ends in .svg")
        check_absent(picture, force=force)
    with context.open(read_only=True) as store:
        base_model, tasks = tasks_of_one_base(store, base_model)
        found = map_of(store, base_model, tasks, view, clusters)
    if picture is not None:
        from icmlora.fleet.map.picture import draw_map

        with writing_file(picture, force=force) as stream:
            stream.write(draw_map(found.map, base_model, view).encode())
    return found


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
