"""Find the seed that an adapter's training began with.

    for every seed:  is the first module's A like what PEFT would have drawn?  ──yes──▶ follow PEFT to the others

For each module PEFT makes two linear layers, discards their initial values, and then draws A again: r * in and out * r
numbers, then r * in. So the first module's A begins after r * (in + out) draws, and each further A after its own
r * (in + out) draws from the end of the previous module. The next module is the best fit there.

Unrelated values have a cosine of about 1 / sqrt(n), so a seed that agrees six times as much is the right one.
"""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from icmlora.adapter.model import Adapter, LoraModule
from icmlora.generator.config import ModuleKind, kind_of
from icmlora.generator.initial_a.draw import InitialA, InitialModule, UniformStream

# Seeds to try: people and trainers use 42 and other numbers of up to four digits.
SEEDS = (12345, 31337, 65537, 123456, 1234567, *range(10_000))
# Limit of the numbers drawn for one table, a minute's work; for a very high rank fewer seeds are tried.
_MAX_DRAWS = 5 * 10**10
_SEEN = 1024  # values of a module's A that are compared
_MIN_AGREEMENT = 0.2  # cosine of A and its initial values; with less in common, knowing the seed saves nothing
_SURE = 6.0  # standard deviations of the cosine of unrelated values
_RECENT = 16  # recently found seeds, which are tried first
# Tables in memory, 10 MB each: one for each rank and width of modules, three for a Llama with all modules targeted.
_TABLES = 16
_Place = tuple[int, int]  # numbers drawn before it, and numbers read
_ROWS = 128  # rows of a table compared at a time: as floats they fit a processor's cache


class SeedSearch:
    """Finds seeds; recent ones are tried first, and draws of all seeds are cached between adapters."""

    def __init__(self, seeds: Sequence[int] = SEEDS) -> None:
        self._seeds = seeds
        self._recent: deque[int] = deque(maxlen=_RECENT)
        self._tables: OrderedDict[_Place, _Table] = OrderedDict()  # least recently used first

    def find(self, adapter: Adapter) -> InitialA | None:
        """Return where an adapter's initial A was drawn, None if no seed matches."""
        # The adapter must be as its trainer wrote it: the canonical gauge mixes the rows of A.
        for seed in chain(tuple(self._recent), self._candidates(adapter)):
            if found := initial_under(adapter, seed):
                if seed not in self._recent:
                    self._recent.appendleft(seed)
                return found
        return None

    def _candidates(self, adapter: Adapter) -> Iterator[int]:
        """Yield the seeds that match some module as the first that PEFT made."""
        first: dict[ModuleKind, LoraModule] = {}  # the module with the lowest layer number of each kind
        for module in adapter.modules:  # in natural order
            first.setdefault(kind_of(module.shape)[0], module)
        heads = [(_before(module), _head(module)) for module in first.values()]
        places = [(before, len(head)) for before, head in heads]
        # Tables that are not in memory are drawn together.
        drawn = _drawn_tables(self._seeds, [place for place in dict.fromkeys(places) if place not in self._tables])
        tables = [drawn.get(place) or self._tables[place] for place in places]
        for place, table in zip(places, tables, strict=True):
            self._tables[place] = table
            self._tables.move_to_end(place)
        while len(self._tables) > _TABLES:
            self._tables.popitem(last=False)
        for (_, head), table in zip(heads, tables, strict=True):
            for number in np.flatnonzero(table.agreements(head) > _threshold(len(head))).tolist():
                yield self._seeds[number]


def initial_under(adapter: Adapter, seed: int) -> InitialA | None:
    """Return where the initial A of an adapter, as its trainer wrote it, was drawn under a seed; None if it was not."""
    # Follows the modules that PEFT made one after the other, up to the first that does not fit.
    stream, position = UniformStream(seed), 0
    waiting = {module.name: (module, _head(module)) for module in adapter.modules}
    drawn = np.zeros(0, dtype=np.float32)  # draws from `position` on that were read ahead
    done: list[InitialModule] = []
    while waiting:
        reach = max(_before(module) + len(head) for module, head in waiting.values())
        further = stream.read(position + len(drawn), max(0, reach - len(drawn)))
        drawn = np.concatenate([drawn, further])
        fits = {}
        for name, (module, head) in waiting.items():
            rows = drawn[_before(module) :][None, : len(head)]  # (1, n)
            fits[name] = float((rows @ head / _lengths(rows))[0]) / _threshold(len(head))
        best = max(fits, key=fits.__getitem__)
        if fits[best] <= 1:  # not better than chance
            break
        module, _ = waiting.pop(best)
        done.append(InitialModule(position + _before(module), module.shape))
        drawn, position = drawn[done[-1].end - position :], done[-1].end
    return InitialA(seed, tuple(done)) if done else None


def _drawn_tables(seeds: Sequence[int], places: Sequence[_Place]) -> dict[_Place, _Table]:
    """Return the draws of every seed at each place, in 127ths, shape (seeds, count)."""
    passes: list[list[_Place]] = []  # the fewest forward-only passes through a stream that read all places
    for place in sorted(places):
        fitting = next((passed for passed in passes if sum(passed[-1]) <= place[0]), None)
        if fitting is None:
            passes.append(fitting := [])
        fitting.append(place)
    tables = {
        place: np.empty((min(len(seeds), max(1, _MAX_DRAWS // sum(place))), place[1]), dtype=np.int8)
        for place in places
    }
    stream = UniformStream(0)
    for passed in passes:
        for number, seed in enumerate(seeds):
            stream.restart(seed)
            for place in passed:
                if number < len(tables[place]):
                    tables[place][number] = stream.read(*place) * 127
    return {place: _Table(draws) for place, draws in tables.items()}


class _Table:
    """The draws of every seed at one place, and the length of each row."""

    def __init__(self, draws: NDArray[np.int8]) -> None:
        self._draws = draws
        self._lengths = np.concatenate([_lengths(block) for block in self._blocks()])

    def agreements(self, head: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the cosine of each seed's draws with values (n,) of length 1, shape (seeds,)."""
        cosines: NDArray[np.float32] = np.concatenate([block @ head for block in self._blocks()]) / self._lengths
        return cosines

    def _blocks(self) -> Iterator[NDArray[np.float32]]:
        """Yield the draws as floats, a few rows at a time; each block is overwritten by the next."""
        floats = np.empty((_ROWS, self._draws.shape[1]), dtype=np.float32)  # new memory for each would cost more time
        for start in range(0, len(self._draws), _ROWS):
            block = self._draws[start : start + _ROWS]
            np.copyto(floats[: len(block)], block)
            yield floats[: len(block)]


def _before(module: LoraModule) -> int:
    """Return how many numbers PEFT draws for a module before its initial A."""
    return module.shape.rank * (module.shape.inputs + module.shape.outputs)


def _head(module: LoraModule) -> NDArray[np.float32]:
    """Return the first values of A, scaled to length 1 (zeros stay zeros), shape (n,)."""
    head = module.a.reshape(-1)[:_SEEN].double().numpy()
    scaled: NDArray[np.float32] = (head / max(float(np.linalg.norm(head)), math.ulp(0.0))).astype(np.float32)
    return scaled


def _lengths(draws: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the lengths of rows, shape (m,); never 0, although a few draws in 127ths may all be 0."""
    lengths: NDArray[np.float32] = np.maximum(np.linalg.norm(draws, axis=1), np.finfo(np.float32).tiny)
    return lengths


def _threshold(count: int) -> float:
    """Return the cosine above which `count` values agree by more than chance."""
    return max(_MIN_AGREEMENT, _SURE / math.sqrt(count))
