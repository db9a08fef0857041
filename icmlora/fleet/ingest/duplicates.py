"""Say which ingested adapter has the same tensors as one that is there, or as another one of the same call.

An adapter is still taken as asked: two tasks may share an adapter on purpose, and equal bytes are stored once anyway.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from icmlora.formats.tensor_hash import plain_config, same_tensors, tensors_digest
from registry.errors import DamagedStore
from registry.names import folded
from registry.records import NewAdapter

if TYPE_CHECKING:
    from registry.tables.origins import Origins

_REMEMBERED = 64


@dataclass(frozen=True)
class _Final:
    """What the final adapter of a task is known by."""

    weights: str
    config: str
    tensors_key: str | None

    @property
    def keys(self) -> list[str]:
        """What it has in common with those that may be the same."""
        return [self.weights] if self.tensors_key is None else [self.weights, self.tensors_key]


class KnownTensors:
    """The final adapters of tasks, found by their tensors.

    Files are read only where two keys are equal. What cannot be read, such as an evicted original or in a dry run the
    new adapter itself, is recognised only if its whole file is the same.
    """

    def __init__(self, origins: Origins | None, read: Callable[[str], bytes] | None) -> None:
        """Begin with the tasks of the store; `read` returns its blobs. Both are None if there is no store yet."""
        self._origins = origins
        self._finals: dict[str, _Final] = {}
        self._names: defaultdict[str, set[str]] = defaultdict(set)
        self._order: dict[str, tuple[int, str]] = {}
        self._digest = lru_cache(_REMEMBERED)(lambda blob: None if read is None else tensors_digest(read(blob)))
        self._config = lru_cache(_REMEMBERED)(lambda blob: None if read is None else plain_config(read(blob)))

    def look_up(self, finals: Mapping[str, NewAdapter]) -> None:
        """Look for the tasks of the store that may have one of these adapters, before any of them is recorded.

        Args:
            finals: Task -> its final adapter.
        """
        if self._origins is None:
            return
        alike = self._origins.with_tensors((row.weights, row.tensors_key) for row in finals.values())
        for origin in (*alike, *self._origins.named(finals).values()):
            if origin.name.lower() not in self._finals:  # else this ingest has recorded it
                self._order[origin.name] = (0, folded(origin.name))
                self._add(origin.name, _Final(origin.weights, origin.config, origin.tensors_key))

    def add(self, task: str, adapter: NewAdapter) -> str | None:
        """Note the final adapter of a task; return the first task known before whose adapter is the same, if any."""
        final = _Final(adapter.weights, adapter.config, adapter.tensors_key)
        near = sorted({name for key in final.keys for name in self._names[key]}, key=self._order.__getitem__)
        found = next((name for name in near if name.lower() != task.lower() and self._is_same(name, final)), None)
        self._order.setdefault(task, (1 + len(self._order), ""))
        self._add(task, final)
        return found

    def same_as_final(self, adapters: Sequence[NewAdapter]) -> tuple[int, ...]:
        """Return the steps of a task's checkpoints whose tensors equal the final adapter's."""
        final = next(row for row in adapters if row.is_final)
        earlier = [row for row in adapters if row.step is not None and not row.is_final]
        try:
            return tuple(row.step for row in earlier if row.step is not None and same_tensors(row, final, self._digest))
        except DamagedStore:
            return ()

    def _add(self, task: str, final: _Final) -> None:
        self._finals[task.lower()] = final
        for key in final.keys:
            self._names[key].add(task)

    def _is_same(self, task: str, final: _Final) -> bool:
        other = self._finals[task.lower()]  # another one than when it was noted, if the task was replaced since
        try:
            return same_tensors(other, final, self._digest) and (
                other.config == final.config or _equal(self._config, other.config, final.config)
            )
        except DamagedStore:
            return False


def _equal(describe: Callable[[str], str | None], left: str, right: str) -> bool:
    one = describe(left)
    return one is not None and one == describe(right)
