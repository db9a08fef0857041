"""The nearest tasks of one, by their vectors. Never imports torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from icm_cli.workflows.known_vectors import comparable_vectors
from icmlora.errors import IcmLoraError
from icmlora.vector_space import FEWEST, Neighbour, ranked, task_distances
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
    tasks = [other for other in store.tasks() if other.base_model == task.base_model]
    for view in _VIEWS:
        try:
            looks = comparable_vectors(store, tasks, view, like=task.name).looks
        except (DamagedStore, IcmLoraError):
            return ()
        if task.name in looks:
            return _neighbours(task.name, looks) if len(looks) >= FEWEST else ()
    return ()


def _neighbours(task: str, looks: Mapping[str, NDArray[np.float32]]) -> tuple[Neighbour, ...]:
    names = list(looks)
    found = ranked(names, task_distances(looks)[names.index(task)])
    return tuple(neighbour for neighbour in found if neighbour.task != task)[:_NEAREST]
