"""Find the tasks of a store that an ingest meets again: by name, by folder, or by tensors.

A store may have a million tasks and an ingest one adapter. So each lookup uses an index of the database, and manifests
are read only of the tasks that it finds.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from registry.errors import DamagedStore
from registry.filters import Selection

if TYPE_CHECKING:
    from registry.manifests import StoredAdapter, Task
    from registry.store import Store
    from registry.tables import TaskRow

_ENDINGS = 1000
"""Endings in one statement."""


class KnownTasks:
    """The tasks of a store; without a store there are none."""

    def __init__(self, store: Store | None) -> None:
        self._store = store
        self._named: dict[str, TaskRow | None] = {}  # by name in lower case; None if there is no such task

    def named(self, names: Iterable[str]) -> dict[str, TaskRow]:
        """Return the tasks with these names, in any case, by name in lower case; each name is looked up once."""
        wanted = {name.lower() for name in names}
        if self._store is not None and (new := wanted - self._named.keys()):
            rows = {row.name.lower(): row for row in self._store.rows_of(names=new)}
            self._named |= {name: rows.get(name) for name in new}
        return {name: row for name in wanted if (row := self._named.get(name)) is not None}

    def in_folders(self, folders: Iterable[str]) -> dict[str, list[TaskRow]]:
        """Return the tasks whose final adapter came from these folders or a checkpoint in one, by folder."""
        found: defaultdict[str, list[TaskRow]] = defaultdict(list)
        for row in () if self._store is None else self._store.rows_of(folders=folders):
            found[row.folder].append(row)
        return found

    def ending_with(self, ends: Iterable[str]) -> Iterator[TaskRow]:
        """Yield the tasks whose names end with `-` and one of these texts, in any case, few in memory at a time."""
        wanted = sorted({f"-{end.lower()}" for end in ends})
        for at in range(0, 0 if self._store is None else len(wanted), _ENDINGS):
            assert self._store is not None
            yield from self._store.rows(Selection(endings=wanted[at : at + _ENDINGS]))

    def with_tensors_of(self, finals: Sequence[StoredAdapter]) -> list[TaskRow]:
        """Return the tasks whose final adapter has the same file, or the same key of tensors, as one of these."""
        if self._store is None:
            return []
        keys = (final.tensors_key for final in finals if final.tensors_key is not None)
        return self._store.rows_of(weights=[final.weights for final in finals], tensors=keys)

    def task(self, row: TaskRow) -> Task | None:
        """Return the task of a row; None if it is damaged, which is reported when the task itself is ingested."""
        assert self._store is not None
        try:
            return self._store.find(row.name)
        except DamagedStore:
            return None

    def tasks(self, names: Iterable[str]) -> dict[str, Task | DamagedStore]:
        """Return the tasks with these names as they are now, by name in lower case, or why one cannot be read."""
        if self._store is None:
            return {}
        rows = self._store.rows_of(names=names)
        self._store.manifests.fetch(row.manifest for row in rows)
        found: dict[str, Task | DamagedStore] = {}
        for row in rows:
            try:
                task = self._store.find(row.name)
            except DamagedStore as error:
                found[row.name.lower()] = error
            else:
                found |= {} if task is None else {row.name.lower(): task}  # another process may remove it at any time
        return found
