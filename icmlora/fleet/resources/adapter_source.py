"""The adapters of a store as training reads them: one at a time, with the latest few kept in memory."""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
from icmlora.fleet.resources.stored_vectors import latest_vectors, read_vectors
from icmlora.generator.config import MAX_SLOTS
from icmlora.generator.initial_a.draw import InitialA
from icmlora.generator.initial_a.search import SeedSearch, initial_under
from icmlora.task_vectors.file import vectors_from_bytes
from registry.filters import Selection
from registry.manifests import StoredAdapter, Task, Vector
from registry.names import escape

if TYPE_CHECKING:
    from registry.store import Store

_CACHE_BYTES = 256 << 20
# An InitialA takes up to 100 kB; drawing it again from its seed takes some hundredths of a second.
_CACHED_INITIALS = 256
_CACHED_VECTOR_FILES = 256  # each has up to some hundred kB
_FLOAT32 = 4  # bytes
_MODULE_BYTES = 2048  # of a module and its two tensors besides the values: more than the values of a tiny adapter
_MAX_NORM = 2.0**26  # of a dW: 2^50 is the most that the network takes, and weights of channels are up to 2^24


@dataclass(frozen=True)
class _Parts:
    """The parts of a task that training reads."""

    task: Task
    checkpoints: Sequence[StoredAdapter]
    vectors: Sequence[Mapping[str, Vector]]  # by view, for each support set

    @property
    def adapters(self) -> Iterator[StoredAdapter]:
        yield self.task.final
        yield from self.checkpoints


class StoreAdapterSource:
    """The tasks of one base model with originals in the store; implements `icmlora.training.source.AdapterSource`."""

    def __init__(self, store: Store, base_model: str, tasks: Iterable[Task], *, with_checkpoints: bool) -> None:
        self._store = store
        self.base_model = base_model
        self.left_out: dict[str, str] = {}
        self.others: list[Task] = []  # that cannot be trained on: evicted ones, and those in `left_out`
        # Manifests stay in memory; of the adapters, which are larger, only the latest ones.
        self._parts: list[_Parts] = []
        for task in tasks:
            reason = task.not_encodable or _too_wide(task.final)
            if task.final.is_evicted or reason is not None:
                self.others.append(task)
                if reason is not None and not task.final.is_evicted:
                    self.left_out[task.name] = reason
                continue
            checkpoints = [
                one
                for one in task.checkpoints
                if with_checkpoints and not (one.is_evicted or one.original_only or _too_wide(one))
            ]
            sets: defaultdict[int, dict[str, Vector]] = defaultdict(dict)
            for vector in latest_vectors(task.vectors):
                sets[vector.support_set][vector.view] = vector
            self._parts.append(_Parts(task, checkpoints, [sets[number] for number in sorted(sets)]))
        self._cache: OrderedDict[tuple[str, str], Adapter] = OrderedDict()
        self._cached = 0
        self._search = SeedSearch()
        self._seeds: dict[int, int | None] = {}
        self._initial = lru_cache(_CACHED_INITIALS)(self._find_initial)
        self._vector_file = lru_cache(_CACHED_VECTOR_FILES)(lambda blob: vectors_from_bytes(store.blobs.read(blob)))

    @classmethod
    def of_base(cls, store: Store, base_model: str) -> StoreAdapterSource:
        """Return all tasks of a base model with their checkpoints."""
        return cls(store, base_model, store.tasks(Selection(base_model=base_model)), with_checkpoints=True)

    def only(self, names: Iterable[str]) -> StoreAdapterSource:
        """Return some of these tasks, without checkpoints."""
        chosen = set(names)
        tasks = (parts.task for parts in self._parts if parts.task.name in chosen)
        return StoreAdapterSource(self._store, self.base_model, tasks, with_checkpoints=False)

    @property
    def names(self) -> list[str]:
        return [parts.task.name for parts in self._parts]

    def leave_out_unusable(self, on_task: Callable[[int, str], None]) -> None:
        """Leave out tasks and checkpoints with damaged bytes or too large values, and note why.

        Args:
            on_task: Called with the number and the name of each task before its adapters are read.
        """

        def failure(stored: StoredAdapter, vectors: Sequence[Mapping[str, Vector]] = ()) -> Exception | None:
            try:
                refuse_large(self._adapter_of(stored))
                for views in vectors:
                    self._read_views(views)
            except FAILURES as error:
                return error
            return None

        kept: list[_Parts] = []
        for number, parts in enumerate(self._parts):
            on_task(number, parts.task.name)
            error = failure(parts.task.final, parts.vectors)
            if error is not None:
                self.left_out[parts.task.name] = as_error(error).message
                self.others.append(parts.task)
            else:
                kept.append(replace(parts, checkpoints=[one for one in parts.checkpoints if failure(one) is None]))
        self._parts = kept

    def tasks(self) -> int:
        return len(self._parts)

    def checkpoints(self, task: int) -> int:
        return len(self._parts[task].checkpoints)

    def task(self, task: int) -> Task:
        """Return a task as it was when training began."""
        return self._parts[task].task

    def adapters(self) -> int:
        """Return the number of adapters, checkpoints included."""
        return sum(1 + len(parts.checkpoints) for parts in self._parts)

    def parameters(self) -> int:
        """Return the number of parameters of all adapters together."""
        return sum(adapter.parameters for parts in self._parts for adapter in parts.adapters)

    def layouts(self) -> Iterator[list[ModuleShape]]:
        """Yield the modules of each adapter with their shapes and ranks, checkpoints included."""
        return (layout_of(adapter) for parts in self._parts for adapter in parts.adapters)

    def digest(self) -> str:
        """Return a digest of everything that training reads: adapters, checkpoints and vectors."""
        adapters = [[parts.task.name, [[one.weights, one.config] for one in parts.adapters]] for parts in self._parts]
        vectors = [
            [sorted((view, vector.blob) for view, vector in views.items()) for views in parts.vectors]
            for parts in self._parts
        ]
        return hashlib.sha256(json.dumps([adapters, vectors]).encode()).hexdigest()

    def load(self, task: int, checkpoint: int | None) -> Adapter:
        """Read one checkpoint of a task, or its final adapter (None).

        Raises:
            AdapterRefused: The adapter is damaged.
            DamagedStore: Its bytes are missing or damaged.
        """
        parts = self._parts[task]
        return self._adapter_of(parts.task.final if checkpoint is None else parts.checkpoints[checkpoint])

    def _adapter_of(self, stored: StoredAdapter) -> Adapter:
        key = stored.config, stored.weights  # the same weights under another alpha are another adapter
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key]
        adapter = read_original(self._store, stored)
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
        return len(self._parts[task].vectors)

    def vectors(self, task: int, support_set: int) -> Mapping[str, torch.Tensor]:
        """Return a task's vectors of one support set by view, each float32 of shape (hidden,)."""
        return self._read_views(self._parts[task].vectors[support_set])

    def _read_views(self, views: Mapping[str, Vector]) -> Mapping[str, torch.Tensor]:
        return {view: self._vector_file(one.blob)[one.view][one.support_set] for view, one in views.items()}

    def mean_vectors(self, task: int) -> Mapping[str, torch.Tensor]:
        """Return a task's vectors by view, averaged over its support sets, each float32 of shape (hidden,)."""
        return mean_vectors(self._store, [one for views in self._parts[task].vectors for one in views.values()])

    def condition_size(self) -> int:
        """Return the length of the fleet's vectors, 0 without any."""
        return next((one.dim for parts in self._parts for views in parts.vectors for one in views.values()), 0)


def mean_vectors(store: Store, vectors: Iterable[Vector]) -> dict[str, torch.Tensor]:
    """Average a task's vectors over its support sets: view -> float32 of shape (hidden,)."""
    views: defaultdict[str, list[torch.Tensor]] = defaultdict(list)
    latest = latest_vectors(vectors)
    for vector, values in zip(latest, read_vectors(store.blobs.read, latest), strict=True):
        views[vector.view].append(torch.from_numpy(values))
    return {view: torch.stack(sets).mean(dim=0) for view, sets in views.items()}


def layout_of(adapter: StoredAdapter) -> list[ModuleShape]:
    """Return the modules of an adapter with their shapes and ranks."""
    return [ModuleShape(*entry) for entry in adapter.layout]


def refuse_large(adapter: Adapter) -> float:
    """Return the norm of dW; refuse an adapter whose training diverged, because no network can be trained on it.

    Raises:
        AdapterRefused: The dW of a module has a norm above 2^26, or is not a number.
    """
    norms = module_norms(adapter)
    for name, norm in norms.items():
        if not norm <= _MAX_NORM:  # nor NaN
            fact = f"its training diverged: dW of {escape(name, 200)} has the norm {norm:.0e}"
            raise AdapterRefused(fact, kind="overflow")
    return total_norm(norms)


def _too_wide(adapter: StoredAdapter) -> str | None:
    is_too_wide = adapter.rank_max > MAX_SLOTS
    return f"its rank exceeds {MAX_SLOTS}, the maximum for a code" if is_too_wide else None


def _bytes_of(adapter: Adapter) -> int:
    return sum(shape.parameters * _FLOAT32 + _MODULE_BYTES for shape in adapter.layout)
