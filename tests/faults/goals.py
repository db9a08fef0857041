"""What each command is to reach, once it runs to its end."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from registry.records import TaskSummary
from registry.store import Store
from tests.faults.commands import GENERATED, MAX_ERROR
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
    digests = {row.weights for row in end.store.originals.evicted()}
    if any(Path(end.store.blobs.place(digest)).exists() for digest in digests):
        return False
    return all(row.final.is_evicted and not row.checkpoints for row in end.rows.values())


def _imported(end: End) -> bool:
    decoded = all(row.final.is_evicted and has_a_copy(end.store, name) for name, row in end.rows.items())
    return end.rows.keys() == set(end.names) and end.is_coded and decoded


def _copied(end: End) -> bool:
    return _ingested(end) and end.is_coded and all(row.vectors for row in end.rows.values())


def _generated(end: End) -> bool:
    made = end.rows.get(GENERATED)
    return end.is_written and made is not None and made.code is not None and made.vectors > 0


GOALS: dict[str, Callable[[End], bool]] = {
    "ingest": _ingested,
    "vectors": lambda end: all(row.vectors for row in end.rows.values()),
    "train": lambda end: end.version is not None and end.is_coded,
    "materialize": lambda end: end.is_written,
    "evict": _evicted,
    "update": lambda end: end.version == 2 and end.is_coded,
    "encode": lambda end: end.is_coded and all(comes_back_within(end.store, name, MAX_ERROR) for name in end.rows),
    "export": lambda end: end.is_written,
    "import": _imported,
    "copy": _copied,
    "generate": _generated,
}
