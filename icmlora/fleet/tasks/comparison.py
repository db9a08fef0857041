"""Compare the adapters of tasks.

    every final adapter ──read once──▶ sketch, norm ──▶ pairs that may be near ──read again──▶ their distances
         `── the tensors of those whose keys are equal ──▶ the same

Of adapters of different base models only the tensors are compared: a header may be wrong. An evicted one counts as
what its code decodes to. One that cannot have a code has no dW that icm knows: only its tensors are compared. Nothing
is changed.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from icmlora.adapter.metrics import distance
from icmlora.adapter.model import Adapter
from icmlora.adapter.sketch import SKETCH_SIZE, near_pairs, sketch
from icmlora.errors import DataError
from icmlora.fleet.context import Context, GeneratorCache
from icmlora.fleet.failures import FAILURES, as_error
from icmlora.fleet.resources.adapter_source import refuse_large
from icmlora.fleet.resources.decoding import code_reader
from icmlora.fleet.resources.loading import original_reader
from icmlora.fleet.resources.stored_vectors import LeftOut
from icmlora.fleet.tasks.duplicate_pairs import DuplicateGroup, DuplicatePair, DuplicatesReport
from icmlora.formats.tensor_hash import plain_config, tensors_digest
from icmlora.io.second_process import in_two_processes
from icmlora.io.threads import side_by_side

if TYPE_CHECKING:
    from registry.manifests import StoredAdapter, Task
    from registry.store import Store

_SMALL = 4 << 20  # bytes; reading files below is mostly Python, so that threads would wait for each other
_TOGETHER = 8  # small adapters that a process reads at a time
_IN_MEMORY = 4  # adapters of the pairs that are compared; one may have hundreds of megabytes


def across_bases(store: Store) -> Iterator[DuplicatePair]:
    """Yield the tasks with the tensors of an older task of another base model, reading few files."""
    by_key: defaultdict[str | None, dict[str, str]] = defaultdict(dict)
    for row in store.rows():
        by_key[row.tensors_key][row.name] = row.base
    for key, base_of in by_key.items():
        if key is None or len(set(base_of.values())) == 1:
            continue
        oldest: dict[str, Task] = {}
        seen: set[tuple[str, str]] = set()
        for task in sorted(store.named([*base_of]), key=age):
            if task.final.is_evicted:
                continue
            config = plain_config(store.blobs.read(task.final.config))
            identity = f"{tensors_digest(store.blobs.read(task.final.weights))} {config}"
            first = oldest.setdefault(identity, task)
            # The others of its base model are in a group with the first of it.
            if (identity, task.base_model) not in seen and first is not task:
                yield DuplicatePair(task.name, first.name, True, 0.0)
            seen.add((identity, task.base_model))


def age(task: Task) -> tuple[str, int, str]:
    """Return a key that sorts tasks oldest first; times are in seconds."""
    return task.created_at, task.seq, task.name


class ReadCounter:
    """Counts the adapters that are read: each once, then again if its pair may be near."""

    def __init__(self, context: Context, total: int) -> None:
        self._context, self._done, self._total = context, 0, total

    def more(self, count: int) -> None:
        self._total += count

    def step(self, note: str) -> None:
        self._done += 1
        self._context.progress(self._done, self._total, note)


class Comparison:
    """Compares the tasks of one base model, oldest first."""

    def __init__(self, store: Store, tasks: Sequence[Task], report: DuplicatesReport, steps: ReadCounter) -> None:
        self._store, self._tasks, self._report, self._steps = store, tasks, report, steps
        self._opened = GeneratorCache()
        self._adapter = lru_cache(_IN_MEMORY)(lambda place: self._reader(place)())
        self._keys = Counter(task.final.tensors_key for task in tasks)
        self._oldest: dict[str, int] = {}  # files, or tensors with their meaning -> place of the oldest such task
        self._same = list(range(len(tasks)))  # place of the oldest task with the same tensors
        self._group = list(range(len(tasks)))  # a place nearer to the task that names the group
        self._links: defaultdict[int, dict[int, float]] = defaultdict(dict)  # place -> place -> distance

    def groups(self, wanted: Collection[str]) -> list[DuplicateGroup]:
        """Return the groups; only those with a task that is wanted, if any is named."""
        places, sketches, norms = self._read_all()
        # Compute the distances of pairs that may be near, and connect those within the limit.
        chosen = {same for same, task in zip(self._same, self._tasks, strict=True) if task.name in wanted}
        pairs = near_pairs(sketches, norms, self._report.max_distance)
        candidates = [(places[older], places[newer]) for older, newer in pairs]
        candidates = [pair for pair in candidates if not wanted or not chosen.isdisjoint(pair)]
        self._steps.more(len(candidates))
        for older, newer in candidates:
            # Probably nearest first, so that a distance between two that are connected already says nothing new.
            if self._root(older) != self._root(newer):
                found = distance(self._adapter(older), self._adapter(newer))
                if found <= self._report.max_distance:
                    self._connect(older, newer, found)
            self._steps.step(self._tasks[newer].name)
        members = defaultdict[int, list[int]](list)
        for place in range(len(self._tasks)):
            members[self._root(place)].append(place)
        groups: list[DuplicateGroup] = []
        for root, of_group in members.items():
            names = tuple(self._tasks[place].name for place in of_group)
            if len(names) > 1 and (not wanted or not set(wanted).isdisjoint(names)):
                similar = sorted(self._pairs(root), key=lambda pair: (pair.distance, not pair.same_tensors, pair.task))
                groups.append(DuplicateGroup(self._tasks[root].base_model, names, tuple(similar)))
        return groups

    def _read_all(self) -> tuple[list[int], npt.NDArray[np.float32], npt.NDArray[np.float64]]:
        """Read every adapter once; return the places of those with a dW of their own, their sketches and norms."""
        tasks, report = self._tasks, self._report
        first = [
            place
            for place, task in enumerate(tasks)
            if self._is_first(place, "\n".join((task.final.weights, task.final.config, task.final.initial or "")))
        ]
        report.compared += len(tasks)
        report.tensors_only += [task.name for task in tasks if task.final.original_only is not None]
        evicted = [tasks[place] for place in first if tasks[place].final.is_evicted]
        report.from_codes += [task.name for task in evicted if task.final.original_only is None]
        self._steps.more(len(first) - len(tasks))
        places, norms = list[int](), list[float]()
        sketches = np.empty((len(first), SKETCH_SIZE), np.float32)
        for place, read in zip(first, self._each(first), strict=True):
            if read.error is not None:
                report.left_out.append(LeftOut(tasks[place].name, read.error))
                report.compared -= 1
            elif (read.identity is None or self._is_first(place, read.identity)) and read.norm > 0.0:
                sketches[len(places)] = read.sketch
                places.append(place)
                norms.append(read.norm)
            self._steps.step(tasks[place].name)
        return places, sketches[: len(places)], np.array(norms)

    def _each(self, places: Sequence[int]) -> Iterator[_Sketched]:
        """Read adapters; as many are in memory as there are processor cores."""
        are_small = sum(self._tasks[place].final.weights.size for place in places) < _SMALL * len(places)
        if are_small and not self._store.blobs.is_remote:
            parts = [places[at : at + _TOGETHER] for at in range(0, len(places), _TOGETHER)]
            yield from in_two_processes(lambda part: map(self._read, part), parts)
        else:
            with side_by_side() as each:
                yield from each(self._read, places)

    def _read(self, place: int) -> _Sketched:
        """Read an adapter and make its sketch."""
        final = self._tasks[place].final
        # Tensors that no other adapter can have need not be hashed. A file without a key may have any.
        is_unique = final.tensors_key is not None and self._keys[final.tensors_key] + self._keys[None] == 1
        try:
            adapter = None if final.original_only is not None else self._reader(place)()
            identity = None if final.is_evicted or is_unique else self._identity(final, adapter)
            if adapter is None:
                return _Sketched(identity=identity)
            norm = refuse_large(adapter)  # squares of its sketch would exceed float32
            return _Sketched(sketch(adapter), norm, identity)
        except FAILURES as error:
            return _Sketched(error=as_error(error).message)

    def _identity(self, final: StoredAdapter, adapter: Adapter | None) -> str:
        # The scale is part of B, from weights or configuration.
        modules = () if adapter is None else adapter.modules
        scales = [f"{module.name} {float(module.b.min())} {float(module.b.max())}" for module in modules]
        # The configuration matters too for an adapter that is more than a LoRA.
        is_plain = final.original_only is None and not _extras(final)
        config = "" if is_plain else plain_config(self._store.blobs.read(final.config))
        return "\n".join([tensors_digest(self._store.blobs.read(final.weights)), f"{final.initial} {config}", *scales])

    def _reader(self, place: int) -> Callable[[], Adapter]:
        """Read the files of an adapter, and return a function that makes it, on any thread."""
        task, read = self._tasks[place], self._store.blobs.read
        if not task.final.is_evicted:
            return original_reader(self._store, task.final)
        if task.code is None:
            raise DataError(f"{task.name} is evicted, and has no code")
        return code_reader(read, self._opened.get(task.code.generator, read), task.code)

    def _is_first(self, place: int, identity: str) -> bool:
        """Note what an adapter is; if an older one is the same, put both into a group."""
        oldest = self._oldest.setdefault(identity, place)
        if oldest == place:
            return True
        self._same[place] = oldest
        self._connect(oldest, place, 0.0)
        return False

    def _connect(self, one: int, other: int, found: float) -> None:
        self._links[one][other] = self._links[other][one] = found
        # The oldest task names its group.
        newer, older = sorted((self._root(one), self._root(other)), reverse=True)
        self._group[newer] = older

    def _root(self, place: int) -> int:
        """Return the place of the oldest task of a group."""
        while self._group[place] != place:
            self._group[place] = self._group[self._group[place]]  # half as far next time
            place = self._group[place]
        return place

    def _pairs(self, root: int) -> Iterator[DuplicatePair]:
        """Yield a pair for each task that is connected to the oldest one."""
        ways = [(root, place, found) for place, found in self._links[root].items()]
        reached = {root}
        for via, place, found in ways:  # grows while it is read
            if place in reached:
                continue
            reached.add(place)
            ways += [(place, further, more) for further, more in self._links[place].items()]
            one, other = self._tasks[place], self._tasks[via]
            is_same = self._same[place] == self._same[via]
            if via != root and not is_same:
                direct = distance(self._adapter(self._same[root]), self._adapter(place))
                if direct <= self._report.max_distance:
                    other, found = self._tasks[root], direct
            extras_differ = not is_same and _extras(one.final) != _extras(other.final)
            yield DuplicatePair(one.name, other.name, is_same, found, extras_differ)


@dataclass(frozen=True)
class _Sketched:
    """The facts of an adapter that stay in memory."""

    sketch: npt.NDArray[np.float32] | None = None
    norm: float = 0.0  # of dW; 0 without a dW of its own
    identity: str | None = None  # equal for adapters whose tensors are equal and mean the same
    error: str | None = None


def _extras(final: StoredAdapter) -> set[str]:
    """Return the digests of the tensors next to dW."""
    return {extra.blob for extra in final.extras if extra.file is None}
