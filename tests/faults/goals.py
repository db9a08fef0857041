"""The goal of each command that runs to its end."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cached_property

from registry.manifests import Task
from registry.store import Store
from tests.faults.commands import GENERATED, GONE, MAX_ERROR, TAG
from tests.faults.promises import comes_back_within, has_a_copy


@dataclass(frozen=True)
class End:
    """The final state.

    Attributes:
        store: The open store.
        names: The tasks of the fleet.
        version_one: The network that an undisturbed training makes.
        is_located: Whether the base model is known on this machine.
        is_written: Whether the output has the very bytes of an undisturbed run.
    """

    store: Store
    names: Collection[str]
    version_one: str
    is_located: bool
    is_written: bool

    @cached_property
    def tasks(self) -> dict[str, Task]:
        """The tasks of the store by name."""
        return {task.name: task for task in self.store.tasks()}

    @property
    def version(self) -> int:
        """The version of the generator in use; 0 without one."""
        return max((one.version for one in self.store.generators()), default=0)

    @property
    def is_coded(self) -> bool:
        """Whether every task has a code, and the first generator is as it should be."""
        first = [one.blob for one in self.store.generators() if one.version == 1]
        return first == [self.version_one] and all(task.code for task in self.tasks.values())

    @property
    def has_fleet(self) -> bool:
        """Whether the store has exactly the tasks of the fleet."""
        return self.tasks.keys() == set(self.names)

    @property
    def is_without_gone(self) -> bool:
        """Whether all tasks of the fleet but one are there."""
        return self.tasks.keys() == set(self.names) - {GONE}


def _ingested(end: End) -> bool:
    checkpoints = sum(len(task.checkpoints) for task in end.tasks.values())
    texts = [task.samples for name, task in end.tasks.items() if name != "silent"]
    return end.has_fleet and checkpoints == 2 and all(texts)


def _evicted(end: End) -> bool:
    adapters = [one for task in end.tasks.values() for one in task.adapters]
    # Where locks may get lost, young bytes stay until they are pruned.
    is_freed = end.store.blobs.is_remote or not any(end.store.blobs.exists(one.weights) for one in adapters)
    return is_freed and all(one.is_evicted for one in adapters)


def _imported(end: End) -> bool:
    decoded = all(task.final.is_evicted and has_a_copy(end.store, name) for name, task in end.tasks.items())
    return end.has_fleet and end.is_coded and decoded


def _versioned(end: End) -> bool:
    first, second = end.store.history(GONE)
    return first.code is not None and second.code is None and second.version == 2


def _generated(end: End) -> bool:
    made = end.tasks.get(GENERATED)
    return made is not None and made.code is not None and len(made.vectors) > 0


GOALS: dict[str, Callable[[End], bool]] = {
    "init": lambda end: not end.tasks,
    "ingest": _ingested,
    "base": lambda end: end.is_located,
    "vectors": lambda end: all(task.vectors for task in end.tasks.values()),
    "train": lambda end: end.version > 0 and end.is_coded,
    "materialize": lambda end: end.is_written,
    "evict": _evicted,
    "update": lambda end: end.version == 2 and end.is_coded,
    "encode": lambda end: end.is_coded and all(comes_back_within(end.store, name, MAX_ERROR) for name in end.tasks),
    "export": lambda end: end.is_written,
    "import": _imported,
    "copy": lambda end: _ingested(end) and end.is_coded and all(task.vectors for task in end.tasks.values()),
    "edit": lambda end: (end.tasks[GONE].tags, end.tasks[GONE].note) == ((TAG,), "seen"),
    "rm": lambda end: end.is_without_gone,
    "prune": lambda end: end.is_without_gone and not any(end.store.verify(read_data=True)),
    "version": _versioned,
    "generate": lambda end: end.is_written and _generated(end),
    "repair": lambda end: end.is_coded and _generated(end) and not any(one.is_problem for one in end.store.verify()),
}
