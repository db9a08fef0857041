"""Find ingested adapters with the same tensors as an adapter of another task, known or of the same call.

They are ingested nevertheless: two tasks may share an adapter on purpose, and equal bytes are stored once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

from icmlora.fleet.ingest.known_tasks import KnownTasks
from icmlora.formats.tensor_hash import plain_config, same_tensors, tensors_digest
from registry.errors import DamagedStore
from registry.manifests import StoredAdapter, Task

if TYPE_CHECKING:
    from registry.tables import TaskRow

_CONFIGS = 64
"""Configurations in memory; of tensors, only digests are kept."""


class KnownTensors:
    """The final adapters of tasks, found by their tensors.

    Files are read only if two keys are equal. Files that cannot be read, such as an evicted original or in a dry run
    the new adapter itself, are recognised only if the whole file is the same.
    """

    def __init__(self, known: KnownTasks, read: Callable[[str], bytes] | None) -> None:
        """Start with the tasks of the store; `read` returns its blobs, and is None without a store."""
        self._known = known
        self._finals: dict[str, StoredAdapter | TaskRow] = {}  # by name in lower case; the row of a known task
        self._names: defaultdict[str, dict[str, int]] = defaultdict(dict)  # key -> name -> position, the store's first
        self._digest = lru_cache(None)(lambda blob: None if read is None else tensors_digest(read(blob)))
        self._plain = lru_cache(_CONFIGS)(lambda blob: None if read is None else plain_config(read(blob)))

    def look_up(self, finals: Sequence[StoredAdapter]) -> None:
        """Note the tasks of the store that may have one of these final adapters, before they are recorded."""
        for row in self._known.with_tensors_of(finals):
            if row.name.lower() not in self._finals:  # otherwise this ingest has recorded it
                self._add(row.name, row)

    def add(self, task: Task) -> str | None:
        """Note a task; return the first task known before with the same final adapter, if any."""
        known = {name: at for key in _keys(task.final) for name, at in self._names[key].items()}
        similar = [name for name in sorted(known, key=known.__getitem__) if name.lower() != task.name.lower()]
        found = next((name for name in similar if self._is_same(self._finals[name.lower()], task.final)), None)
        self._add(task.name, task.final)
        return found

    def same_as_final(self, task: Task) -> tuple[int, ...]:
        """Return the steps of a task's checkpoints whose tensors equal the final adapter's."""
        steps = ((one.step, one) for one in task.checkpoints)
        try:
            return tuple(
                step for step, one in steps if step is not None and same_tensors(one, task.final, self._digest)
            )
        except DamagedStore:
            return ()

    def _add(self, name: str, final: StoredAdapter | TaskRow) -> None:
        self._finals[name.lower()] = final
        for key in _keys(final):
            self._names[key].setdefault(name, len(self._finals))

    def _is_same(self, known: StoredAdapter | TaskRow, final: StoredAdapter) -> bool:
        try:
            if not same_tensors(known, final, self._digest):
                return False
            if not isinstance(known, StoredAdapter):
                task = self._known.task(known)
                if task is None:
                    return False
                known = task.final
            if known.config == final.config:
                return True
            plain = self._plain(known.config)
            return plain is not None and plain == self._plain(final.config)
        except DamagedStore:
            return False


def _keys(final: StoredAdapter | TaskRow) -> list[str]:
    """Return keys that are equal for adapters that may be the same."""
    return [str(final.weights)] if final.tensors_key is None else [str(final.weights), final.tensors_key]
