"""The nearest tasks of one, by their vectors. Never imports torch.

The map of a fleet by its task vectors. Never imports torch.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from icmlora.errors import DataError, IcmLoraError
from icmlora.fleet.context import Context, check_base_model
from icmlora.fleet.pictures import MappedFleet, draw_map, grouped_reasons
from icmlora.fleet.stored_vectors import LeftOut, comparable_vectors
from icmlora.io.staging import check_absent, writing_file
from icmlora.task_vectors.clusters import map_tasks
from icmlora.task_vectors.distances import FEWEST, Neighbour, ranked, task_distances
from registry.errors import DamagedStore
from registry.records import TaskRecord, View

if TYPE_CHECKING:
    from registry.store import Store

_NEAREST = 5
_VIEWS: tuple[View, ...] = ("adapted", "context")


def nearest_tasks(store: Store, task: TaskRecord) -> tuple[Neighbour, ...]:
    """Return the tasks that are nearest to one, at most five; none where too few can be compared.

    By the adapted view, or by the context view if the task has no other, as one that was generated. Damaged vectors
    say nothing here; `icm verify` says that they are damaged.
    """
    tasks = [other for other in store.tasks.all() if other.base_model == task.base_model]
    for view in _VIEWS:
        try:
            vectors = comparable_vectors(store, tasks, view, like=task.name).vectors
        except (DamagedStore, IcmLoraError):
            return ()
        if task.name in vectors:
            return _neighbours(task.name, vectors) if len(vectors) >= FEWEST else ()
    return ()


def _neighbours(task: str, vectors: Mapping[str, NDArray[np.float32]]) -> tuple[Neighbour, ...]:
    names = list(vectors)
    found = ranked(names, task_distances(vectors)[names.index(task)])
    return tuple(neighbour for neighbour in found if neighbour.task != task)[:_NEAREST]


_VECTORS = "`icm vectors` makes the vectors that are missing"


@dataclass(frozen=True)
class MapRequest:
    """What `icm map` was asked for."""

    view: View = "adapted"
    base_model: str | None = None
    clusters: int | None = None
    """How many; None for the number with the best silhouette."""
    plot: Path | None = None
    force: bool = False


def map_fleet(context: Context, request: MapRequest) -> MappedFleet:
    """Make the map of a base model's tasks, and draw it if a file is named: whole, or not at all.

    Raises:
        DataError: Fewer than three tasks have vectors that can be compared, or tasks of several base models; there are
            fewer tasks than clusters; or the picture is no .svg file.
        OutputExists: The picture exists and `force` is not given.
        DamagedStore: Vectors are missing or damaged.
    """
    if request.plot is not None:
        if request.plot.suffix.lower() != ".svg":
            raise DataError("the picture of a map is an .svg file", path=request.plot, hint="give it the ending .svg")
        check_absent(request.plot, force=request.force)
    with context.open(read_only=True) as store:
        base_model, tasks = _of_one_base(store, request.base_model)
        known = comparable_vectors(store, tasks, request.view)
    if len(known.vectors) < FEWEST:
        raise _too_few(base_model, request.view, list(known.vectors), known.left_out)
    if request.clusters is not None and request.clusters > len(known.vectors):
        fact = f"{len(known.vectors)} tasks cannot make {request.clusters} clusters"
        raise DataError(fact, hint="`--clusters auto` takes the number with the best silhouette")
    found = MappedFleet(
        base_model=base_model,
        view=request.view,
        map=map_tasks(known.vectors, request.clusters),
        support_sets=sum(len(vectors) for vectors in known.vectors.values()),
        left_out=known.left_out,
    )
    if request.plot is not None:
        with writing_file(request.plot, force=request.force) as stream:
            stream.write(draw_map(found).encode())
    return found


def _of_one_base(store: Store, base_model: str | None) -> tuple[str, Sequence[TaskRecord]]:
    """Return the base model that is meant, and its tasks."""
    by_base: defaultdict[str, list[TaskRecord]] = defaultdict(list)
    has_vectors: defaultdict[str, bool] = defaultdict(bool)
    for row in store.tasks.summaries():
        by_base[row.task.base_model].append(row.task)
        has_vectors[row.task.base_model] |= row.vectors > 0
    if base_model is not None:
        check_base_model(base_model, by_base)
        return base_model, by_base[base_model]
    ready = sorted(base for base, has in has_vectors.items() if has)
    if len(ready) > 1:
        fact = f"a map has one base model, and tasks of {len(ready)} have vectors: {', '.join(ready)}"
        raise DataError(fact, hint="choose one with --base-model NAME")
    if not ready:
        raise DataError("no task has vectors", hint=_VECTORS)
    return ready[0], by_base[ready[0]]


def _too_few(base_model: str, view: View, mapped: Sequence[str], left_out: Sequence[LeftOut]) -> DataError:
    fact = f"a map needs {FEWEST} tasks of {base_model} whose vectors of the {view} view were made alike"
    have = f"there {'is' if len(mapped) == 1 else 'are'} {len(mapped)}"
    return DataError("; ".join([f"{fact}, and {have}", *grouped_reasons(left_out)]), hint=_VECTORS)
