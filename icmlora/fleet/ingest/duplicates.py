"""Find ingested adapters with the same tensors as an adapter of another task, known or of the same call.

They are ingested nevertheless: two tasks may share an adapter on purpose, and equal bytes are stored once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from icmlora.fleet.ingest.known_tasks import KnownTasks
from icmlora.formats.tensor_hash import plain_config, same_tensors, tensors_digest
from registry.errors import DamagedStore
from registry.manifests import Adapter, Task

_REMEMBERED = 64


@dataclass(frozen=True)
class _Final:
    """The files of the final adapter of a task."""

    weights: str
    config: str
    tensors_key: str | None

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
        self._names: defaultdict[str, dict[str, None]] = defaultdict(dict)  # key -> names, those of the store first
        self._digest = lru_cache(_REMEMBERED)(lambda blob: None if read is None else tensors_digest(read(blob)))
        self._config = lru_cache(_REMEMBERED)(lambda blob: None if read is None else plain_config(read(blob)))

    def look_up(self, finals: Sequence[Adapter]) -> None:
        """Look up the tasks of the store that may have one of these final adapters, before they are recorded."""
        for task in self._known.with_tensors_of(finals):
            if task.name.lower() not in self._finals:  # otherwise this ingest has recorded it
                self._add(task)

    def add(self, task: Task) -> str | None:
        """Note a task; return the first task known before with the same final adapter, if any."""
        final = _final_of(task)
        similar = dict.fromkeys(name for key in final.keys for name in self._names[key])
        others = (name for name in similar if name.lower() != task.name.lower())
        found = next((name for name in others if self._is_same(self._finals[name.lower()], final)), None)
        self._add(task)
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

    def _add(self, task: Task) -> None:
        self._finals[task.name.lower()] = final = _final_of(task)
        for key in final.keys:
            self._names[key][task.name] = None

    def _is_same(self, one: _Final, other: _Final) -> bool:
        try:
            return same_tensors(one, other, self._digest) and (
                one.config == other.config or _equal(self._config, one.config, other.config)
            )
        except DamagedStore:
            return False


def _final_of(task: Task) -> _Final:
    return _Final(str(task.final.weights), str(task.final.config), task.final.tensors_key)


def _equal(describe: Callable[[str], str | None], left: str, right: str) -> bool:
    one = describe(left)
    return one is not None and one == describe(right)
