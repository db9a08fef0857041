"""The adapters of a store as training reads them: one at a time, with the latest few kept in memory."""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import torch

from icmlora.adapter.layout import ModuleShape
from icmlora.adapter.metrics import module_norms, total_norm
from icmlora.adapter.model import Adapter
from icmlora.errors import AdapterRefused
from icmlora.fleet.failures import FAILURES, as_error
from icmlora.fleet.resources.loading import read_original
from icmlora.fleet.resources.stored_vectors import latest_vectors
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
_TOO_WIDE = f"its rank is above {MAX_SLOTS}, the largest that a code can hold"


class StoreAdapterSource:
    """The tasks of one base model whose originals are there; implements `icmlora.training.source.AdapterSource`."""

    def __init__(self, store: Store, base_model: str, names: Collection[str] | None = None) -> None:
        self._store = store
        self.base_model = base_model
        rows = [
            row for row in store.tasks.summaries() if row.task.base_model == base_model and not row.final.is_evicted
        ]
        rows = [row for row in rows if names is None or row.task.name in names]
        reasons = {row.task.name: row.final.original_only or _too_wide(row.final) for row in rows}
        self.left_out = {name: reason for name, reason in reasons.items() if reason is not None}
        rows = [row for row in rows if row.task.name not in self.left_out]
        self.names = [row.task.name for row in rows]
        self._finals = [row.final for row in rows]
        self._checkpoints = [
            [one for one in store.tasks.adapters(row.task.name) if _is_checkpoint(one)]
            if names is None and row.checkpoints
            else []
            for row in rows
        ]
        vectors = defaultdict[str, list[VectorRecord]](list)
        for row in store.vectors.all():
            vectors[row.task].append(row)
        self._vectors = [_by_support_set(vectors[name]) for name in self.names]
        # Rows stay in memory; of the adapters, which are larger, only those read last.
        self._cache: OrderedDict[tuple[str, str], Adapter] = OrderedDict()
        self._cached = 0
        self._search = SeedSearch()
        self._seeds: dict[int, int | None] = {}
        self._initial = lru_cache(_CACHED_INITIALS)(self._find_initial)
        self._vector_file = lru_cache(_CACHED_VECTOR_FILES)(lambda blob: vectors_from_bytes(store.blobs.read(blob)))

    def leave_out_unusable(self, tell: Callable[[int, str], None]) -> None:
        """Leave out tasks and checkpoints whose bytes are damaged or whose values are too large, and note why.

        Args:
            tell: Called with the number and the name of each task before its adapters are read.
        """
        kept = [task for task in range(len(self.names)) if self._is_usable(task, tell)]
        self.names = [self.names[task] for task in kept]
        self._finals = [self._finals[task] for task in kept]
        self._checkpoints = [self._checkpoints[task] for task in kept]
        self._vectors = [self._vectors[task] for task in kept]

    def _is_usable(self, task: int, tell: Callable[[int, str], None]) -> bool:
        tell(task, self.names[task])
        try:
            refuse_large(self.load(task, None))
            for support_set in range(self.support_sets(task)):
                self.vectors(task, support_set)
        except FAILURES as error:
            self.left_out[self.names[task]] = as_error(error).message
            return False
        self._checkpoints[task] = [row for row in self._checkpoints[task] if self._is_usable_row(row)]
        return True

    def _is_usable_row(self, row: AdapterRecord) -> bool:
        try:
            refuse_large(self._adapter_of(row))
        except FAILURES:
            return False
        return True

    def tasks(self) -> int:
        """Return the number of tasks."""
        return len(self.names)

    def checkpoints(self, task: int) -> int:
        """Return the number of checkpoints of a task."""
        return len(self._checkpoints[task])

    def final(self, task: int) -> AdapterRecord:
        """Return the row of a task's final adapter."""
        return self._finals[task]

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
        for final, checkpoints in zip(self._finals, self._checkpoints, strict=True):
            yield final
            yield from checkpoints

    def digest(self) -> str:
        """Return a digest of everything that training reads: adapters, checkpoints and vectors."""
        adapters = [[row.task, row.is_final, row.weights, row.config] for row in self._rows()]
        vectors = [[sorted((view, row.blob) for view, row in rows.items()) for rows in sets] for sets in self._vectors]
        return hashlib.sha256(json.dumps([adapters, vectors]).encode()).hexdigest()

    def load(self, task: int, checkpoint: int | None) -> Adapter:
        """Read one checkpoint of a task, or its final adapter (None)."""
        return self._adapter_of(self._finals[task] if checkpoint is None else self._checkpoints[task][checkpoint])

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
        return len(self._vectors[task])

    def vectors(self, task: int, support_set: int) -> Mapping[str, torch.Tensor]:
        """Return a task's vectors of one support set by view."""
        rows = self._vectors[task][support_set]
        return {view: self._vector_file(row.blob)[row.view][row.support_set] for view, row in rows.items()}

    def mean_vectors(self, task: int) -> Mapping[str, torch.Tensor]:
        """Return a task's vectors by view, averaged over its support sets."""
        return mean_vectors(self._store, [row for sets in self._vectors[task] for row in sets.values()])

    def condition_size(self) -> int:
        """Return the length of the fleet's vectors, 0 without any."""
        return next((row.dim for sets in self._vectors for rows in sets for row in rows.values()), 0)


def mean_vectors(store: Store, rows: Iterable[VectorRecord]) -> dict[str, torch.Tensor]:
    """Average a task's vectors over its support sets: view -> tensor of shape (hidden,)."""
    views: defaultdict[str, list[torch.Tensor]] = defaultdict(list)
    latest = latest_vectors(rows)
    for row, values in zip(latest, _read(store, latest), strict=True):
        views[row.view].append(values)
    return {view: torch.stack(sets).mean(dim=0) for view, sets in views.items()}


def _read(store: Store, rows: Sequence[VectorRecord]) -> list[torch.Tensor]:
    """Read vectors; a file holds all vectors of one extraction, so each is read once."""
    files = {blob: vectors_from_bytes(store.blobs.read(blob)) for blob in {row.blob for row in rows}}
    return [files[row.blob][row.view][row.support_set] for row in rows]


def layout_of(row: AdapterRecord) -> list[ModuleShape]:
    """Return the modules of an adapter with their shapes and ranks."""
    return [ModuleShape(*entry) for entry in row.layout]


def _is_checkpoint(row: AdapterRecord) -> bool:
    return not (row.is_final or row.is_evicted or row.original_only or _too_wide(row))


def refuse_large(adapter: Adapter) -> float:
    """Return the norm of dW; refuse an adapter whose training diverged, with which no network could be trained."""
    norms = module_norms(adapter)
    for name, norm in norms.items():
        if not norm <= _LARGEST:  # nor NaN
            fact = f"its training diverged: dW of {escape(name, 200)} has the size {norm:.0e}"
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
