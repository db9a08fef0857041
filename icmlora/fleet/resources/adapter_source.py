"""The adapters of a store as training reads them: one at a time, with the latest few kept in memory."""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING

import torch

from icmlora.adapter.layout import ModuleShape
from icmlora.adapter.metrics import module_norms, total_norm
from icmlora.adapter.model import Adapter
from icmlora.errors import AdapterRefused
from icmlora.fleet.failures import FAILURES, as_error
from icmlora.fleet.resources.loading import read_original
from icmlora.fleet.resources.stored_vectors import latest_vectors, read_vectors, vectors_by_task
from icmlora.generator.config import MAX_SLOTS
from icmlora.generator.initial_a.draw import InitialA
from icmlora.generator.initial_a.search import SeedSearch, initial_under
from icmlora.task_vectors.file import vectors_from_bytes
from registry.names import escape
from registry.records import AdapterRecord, VectorRecord

if TYPE_CHECKING:
    from registry.store import Store

_CACHE_BYTES = 256 << 20
# An InitialA takes up to 100 kB; drawing it again from its seed takes some hundredths of a second.
_CACHED_INITIALS = 256
_CACHED_VECTOR_FILES = 256  # each has up to some hundred kB
_FLOAT32 = 4  # bytes
_MODULE_BYTES = 2048  # of two tensors and their module besides the values: more than the values of a tiny adapter
_LARGEST = 2.0**26  # norm of a dW: 2^50 is the most that the network takes, and weights of channels are up to 2^24
_TOO_WIDE = f"its rank exceeds {MAX_SLOTS}, the maximum for a code"


@dataclass(frozen=True)
class _Rows:
    """The rows of one task."""

    final: AdapterRecord
    checkpoints: Sequence[AdapterRecord]
    vectors: Sequence[Mapping[str, VectorRecord]]  # by view, for each support set


class StoreAdapterSource:
    """The tasks of one base model whose originals are there; implements `icmlora.training.source.AdapterSource`."""

    def __init__(self, store: Store, base_model: str, names: Collection[str] | None = None) -> None:
        self._store = store
        self.base_model = base_model
        self.left_out: dict[str, str] = {}
        # Rows stay in memory; of the adapters, which are larger, only those read last.
        self._tasks: list[_Rows] = []
        vectors = vectors_by_task(store)
        for row in store.tasks.summaries():
            name, final = row.task.name, row.final
            if row.task.base_model != base_model or final.is_evicted or (names is not None and name not in names):
                continue
            reason = final.original_only or _too_wide(final)
            if reason is not None:
                self.left_out[name] = reason
                continue
            of_all = names is None and row.checkpoints
            checkpoints = list(filter(_is_checkpoint, store.tasks.adapters(name))) if of_all else []
            self._tasks.append(_Rows(final, checkpoints, _by_support_set(vectors[name])))
        self._cache: OrderedDict[tuple[str, str], Adapter] = OrderedDict()
        self._cached = 0
        self._search = SeedSearch()
        self._seeds: dict[int, int | None] = {}
        self._initial = lru_cache(_CACHED_INITIALS)(self._find_initial)
        self._vector_file = lru_cache(_CACHED_VECTOR_FILES)(lambda blob: vectors_from_bytes(store.blobs.read(blob)))

    @property
    def names(self) -> list[str]:
        """The names of the tasks."""
        return [rows.final.task for rows in self._tasks]

    def leave_out_unusable(self, tell: Callable[[int, str], None]) -> None:
        """Leave out tasks and checkpoints whose bytes are damaged or whose values are too large, and note why.

        Args:
            tell: Called with the number and the name of each task before its adapters are read.
        """
        kept: list[_Rows] = []
        for task, rows in enumerate(self._tasks):
            tell(task, rows.final.task)
            try:
                refuse_large(self._adapter_of(rows.final))
                for support_set in range(self.support_sets(task)):
                    self.vectors(task, support_set)
            except FAILURES as error:
                self.left_out[rows.final.task] = as_error(error).message
            else:
                kept.append(replace(rows, checkpoints=list(filter(self._is_usable, rows.checkpoints))))
        self._tasks = kept

    def _is_usable(self, row: AdapterRecord) -> bool:
        try:
            refuse_large(self._adapter_of(row))
        except FAILURES:
            return False
        return True

    def tasks(self) -> int:
        """Return the number of tasks."""
        return len(self._tasks)

    def checkpoints(self, task: int) -> int:
        """Return the number of checkpoints of a task."""
        return len(self._tasks[task].checkpoints)

    def final(self, task: int) -> AdapterRecord:
        """Return the row of a task's final adapter."""
        return self._tasks[task].final

    def adapters(self) -> int:
        """Return the number of adapters, checkpoints included."""
        return sum(1 for _ in self._rows())

    def parameters(self) -> int:
        """Return the number of parameters of all adapters together."""
        return sum(row.parameters for row in self._rows())

    def layouts(self) -> Iterator[list[ModuleShape]]:
        """Yield the modules of each adapter with their shapes and ranks, checkpoints included."""
        return (layout_of(row) for row in self._rows())

    def _rows(self) -> Iterator[AdapterRecord]:
        for rows in self._tasks:
            yield rows.final
            yield from rows.checkpoints

    def digest(self) -> str:
        """Return a digest of everything that training reads: adapters, checkpoints and vectors."""
        adapters = [[row.task, row.is_final, row.weights, row.config] for row in self._rows()]
        vectors = [
            [sorted((view, row.blob) for view, row in views.items()) for views in rows.vectors] for rows in self._tasks
        ]
        return hashlib.sha256(json.dumps([adapters, vectors]).encode()).hexdigest()

    def load(self, task: int, checkpoint: int | None) -> Adapter:
        """Read one checkpoint of a task, or its final adapter (None).

        Raises:
            AdapterRefused: The adapter is damaged.
            DamagedStore: Its bytes are missing or damaged.
        """
        rows = self._tasks[task]
        return self._adapter_of(rows.final if checkpoint is None else rows.checkpoints[checkpoint])

    def _adapter_of(self, row: AdapterRecord) -> Adapter:
        key = row.config, row.weights  # the same weights under another alpha are another adapter
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key]
        adapter = read_original(self._store, row)
        self._cache[key] = adapter
        self._cached += _bytes_of(adapter)
        while self._cached > _CACHE_BYTES and len(self._cache) > 1:
            _, dropped = self._cache.popitem(last=False)
            self._cached -= _bytes_of(dropped)
        return adapter

    def initial(self, task: int) -> InitialA | None:
        """Return the initial A of a task's adapters as its seed gives it, None if the seed is not known."""
        return self._initial(task)

    def _find_initial(self, task: int) -> InitialA | None:
        # The search takes seconds, drawing from a known seed hundredths of one, so every seed is kept.
        if task in self._seeds:
            seed = self._seeds[task]
            return None if seed is None else initial_under(self.load(task, None), seed)
        found = self._search.find(self.load(task, None))
        self._seeds[task] = None if found is None else found.seed
        return found

    def support_sets(self, task: int) -> int:
        """Return the number of support sets with vectors, 0 without any."""
        return len(self._tasks[task].vectors)

    def vectors(self, task: int, support_set: int) -> Mapping[str, torch.Tensor]:
        """Return a task's vectors of one support set by view, each float32 of shape (hidden,)."""
        rows = self._tasks[task].vectors[support_set]
        return {view: self._vector_file(row.blob)[row.view][row.support_set] for view, row in rows.items()}

    def mean_vectors(self, task: int) -> Mapping[str, torch.Tensor]:
        """Return a task's vectors by view, averaged over its support sets, each float32 of shape (hidden,)."""
        return mean_vectors(self._store, [row for views in self._tasks[task].vectors for row in views.values()])

    def condition_size(self) -> int:
        """Return the length of the fleet's vectors, 0 without any."""
        return next((row.dim for rows in self._tasks for views in rows.vectors for row in views.values()), 0)


def mean_vectors(store: Store, rows: Iterable[VectorRecord]) -> dict[str, torch.Tensor]:
    """Average a task's vectors over its support sets: view -> float32 of shape (hidden,)."""
    views: defaultdict[str, list[torch.Tensor]] = defaultdict(list)
    latest = latest_vectors(rows)
    for row, values in zip(latest, read_vectors(store.blobs.read, latest), strict=True):
        views[row.view].append(torch.from_numpy(values))
    return {view: torch.stack(sets).mean(dim=0) for view, sets in views.items()}


def layout_of(row: AdapterRecord) -> list[ModuleShape]:
    """Return the modules of an adapter with their shapes and ranks."""
    return [ModuleShape(*entry) for entry in row.layout]


def _is_checkpoint(row: AdapterRecord) -> bool:
    return not (row.is_final or row.is_evicted or row.original_only or _too_wide(row))


def refuse_large(adapter: Adapter) -> float:
    """Return the norm of dW; refuse an adapter whose training diverged, with which no network could be trained.

    Raises:
        AdapterRefused: The dW of a module has a norm above 2^26, or is not a number.
    """
    norms = module_norms(adapter)
    for name, norm in norms.items():
        if not norm <= _LARGEST:  # nor NaN
            fact = f"its training diverged: dW of {escape(name, 200)} has the norm {norm:.0e}"
            raise AdapterRefused(fact, kind="overflow")
    return total_norm(norms)


def _too_wide(row: AdapterRecord) -> str | None:
    return _TOO_WIDE if row.rank_max > MAX_SLOTS else None


def _by_support_set(rows: Iterable[VectorRecord]) -> list[dict[str, VectorRecord]]:
    sets: defaultdict[int, dict[str, VectorRecord]] = defaultdict(dict)
    for row in latest_vectors(rows):
        sets[row.support_set][row.view] = row
    return [sets[number] for number in sorted(sets)]


def _bytes_of(adapter: Adapter) -> int:
    return sum(shape.parameters * _FLOAT32 + _MODULE_BYTES for shape in adapter.layout)
