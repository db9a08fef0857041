"""Find ingested adapters with the same tensors as an adapter of another task, known or of the same call.

They are ingested nevertheless: two tasks may share an adapter on purpose, and equal bytes are stored once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from icmlora.fleet.ingest.known_tasks import KnownTasks
from icmlora.formats.tensor_hash import plain_config, same_tensors, tensors_digest
from registry.errors import DamagedStore
from registry.manifests import Adapter, Task

if TYPE_CHECKING:
    from registry.tables import TaskRow

_CONFIGS = 64
"""Configurations in memory; of tensors, only digests are kept."""


@dataclass(frozen=True)
class _Final:
    """The final adapter of a task. The row of a known task replaces its configuration until that is compared."""

    weights: str
    tensors_key: str | None
    config: str | TaskRow

    @property
    def keys(self) -> list[str]:
        """Equal for adapters that may be the same."""
        return [self.weights] if self.tensors_key is None else [self.weights, self.tensors_key]


class KnownTensors:
    """The final adapters of tasks, found by their tensors.

    Files are read only if two keys are equal. Files that cannot be read, such as an evicted original or in a dry run
    the new adapter itself, are recognised only if the whole file is the same.
    """

    def __init__(self, known: KnownTasks, read: Callable[[str], bytes] | None) -> None:
        """Start with the tasks of the store; `read` returns its blobs, and is None without a store."""
        self._known = known
        self._finals: dict[str, _Final] = {}
        self._names: defaultdict[str, dict[str, int]] = defaultdict(dict)  # key -> name -> position, the store's first
        self._digest = lru_cache(None)(lambda blob: None if read is None else tensors_digest(read(blob)))
        self._plain = lru_cache(_CONFIGS)(lambda blob: None if read is None else plain_config(read(blob)))

    def look_up(self, finals: Sequence[Adapter]) -> None:
        """Note the tasks of the store that may have one of these final adapters, before they are recorded."""
        for row in self._known.with_tensors_of(finals):
            if row.name.lower() not in self._finals:  # otherwise this ingest has recorded it
                self._add(row.name, _Final(row.weights, row.tensors_key, row))

    def add(self, task: Task) -> str | None:
        """Note a task; return the first task known before with the same final adapter, if any."""
        final = _Final(str(task.final.weights), task.final.tensors_key, str(task.final.config))
        known = {name: at for key in final.keys for name, at in self._names[key].items()}
        similar = [name for name in sorted(known, key=known.__getitem__) if name.lower() != task.name.lower()]
        found = next((name for name in similar if self._is_same(self._finals[name.lower()], final)), None)
        self._add(task.name, final)
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

    def _add(self, name: str, final: _Final) -> None:
        self._finals[name.lower()] = final
        for key in final.keys:
            self._names[key].setdefault(name, len(self._finals))

    def _is_same(self, one: _Final, other: _Final) -> bool:
        try:
            if not same_tensors(one, other, self._digest):
                return False
            left, right = self._config(one), self._config(other)
            if left is None or right is None or left == right:
                return left is not None and left == right
            plain = self._plain(left)
            return plain is not None and plain == self._plain(right)
        except DamagedStore:
            return False

    def _config(self, final: _Final) -> str | None:
        if isinstance(final.config, str):
            return final.config
        task = self._known.task(final.config)
        return None if task is None else task.final.config
