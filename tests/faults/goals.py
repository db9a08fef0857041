"""What each command is to reach, once it runs to its end."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cached_property

from registry.records import TaskSummary
from registry.store import Store
from tests.faults.commands import GENERATED, GONE, MAX_ERROR, TAG
from tests.faults.promises import comes_back_within, has_a_copy
from tests.icmlora.tiny_base import LABEL


@dataclass(frozen=True)
class End:
    """What there is in the end.

    Attributes:
        store: The open store.
        names: The tasks of the fleet.
        version_one: The generator that an undisturbed training makes.
        is_written: Whether the output has the very bytes of an undisturbed run.
    """

    store: Store
    names: Collection[str]
    version_one: str
    is_written: bool

    @cached_property
    def rows(self) -> dict[str, TaskSummary]:
        """The tasks of the store by name."""
        return {row.task.name: row for row in self.store.tasks.summaries()}

    @property
    def version(self) -> int | None:
        """The current generator's version; None without one."""
        generator = self.store.generators.current(LABEL)
        return None if generator is None else generator.version

    @property
    def is_coded(self) -> bool:
        """Whether every task has a code under the current generator, and the first one is as it should be."""
        first = [record.blob for record in self.store.generators.all() if record.version == 1]
        return first == [self.version_one] and all(row.code for row in self.rows.values())


def _ingested(end: End) -> bool:
    checkpoints = sum(row.checkpoints for row in end.rows.values())
    texts = [row.task.samples for name, row in end.rows.items() if name != "silent"]
    return end.rows.keys() == set(end.names) and checkpoints == 2 and all(texts)


def _evicted(end: End) -> bool:
    adapters = (row for name in end.rows for row in end.store.tasks.adapters(name))
    digests = {row.weights for row in adapters if row.is_evicted}
    # Where a lock may be lost on the way, what is young stays until it is pruned.
    if not end.store.blobs.is_remote and any(map(end.store.blobs.exists, digests)):
        return False
    return all(row.final.is_evicted and not row.checkpoints for row in end.rows.values())


def _imported(end: End) -> bool:
    decoded = all(row.final.is_evicted and has_a_copy(end.store, name) for name, row in end.rows.items())
    return end.rows.keys() == set(end.names) and end.is_coded and decoded


def _copied(end: End) -> bool:
    return _ingested(end) and end.is_coded and all(row.vectors for row in end.rows.values())


def _edited(end: End) -> bool:
    task = end.rows[GONE].task
    return (task.tags, task.note) == ((TAG,), "seen")


def _pruned(end: End) -> bool:
    return not any(end.store.verify(read_data=True)) and _removed(end)


def _removed(end: End) -> bool:
    return end.rows.keys() == set(end.names) - {GONE}


def _generated(end: End) -> bool:
    made = end.rows.get(GENERATED)
    return end.is_written and made is not None and made.code is not None and made.vectors > 0


GOALS: dict[str, Callable[[End], bool]] = {
    "init": lambda end: not end.rows,
    "ingest": _ingested,
    "base": lambda end: [base.path is not None for base in end.store.base_models.all()] == [True],
    "vectors": lambda end: all(row.vectors for row in end.rows.values()),
    "train": lambda end: end.version is not None and end.is_coded,
    "materialize": lambda end: end.is_written,
    "evict": _evicted,
    "update": lambda end: end.version == 2 and end.is_coded,
    "encode": lambda end: end.is_coded and all(comes_back_within(end.store, name, MAX_ERROR) for name in end.rows),
    "export": lambda end: end.is_written,
    "import": _imported,
    "copy": _copied,
    "edit": _edited,
    "rm": _removed,
    "prune": _pruned,
    "generate": _generated,
}
