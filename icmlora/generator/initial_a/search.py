"""Find the seed that an adapter's training began with.

    for every seed:  is the first module's A like what PEFT would have drawn?  ──yes──▶ follow PEFT to the others

For each module PEFT makes two linear layers, whose own initial values it draws and throws away, and then draws A
again: r * in and out * r numbers, then r * in. So the first module's A begins after r * (in + out) draws, and each
further one as far after the end of the module before it. The next module is the one that fits best there.

Unrelated values have a cosine of about 1 / sqrt(n), so a seed that agrees six times as much is the right one.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from functools import lru_cache, partial
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from icmlora.adapter.model import Adapter, LoraModule
from icmlora.generator.config import ModuleKind, kind_of
from icmlora.generator.initial_a.draw import InitialA, InitialModule, UniformStream

# Seeds that are tried: 42 and other numbers of up to four digits are what people and trainers use.
SEEDS = (12345, 31337, 65537, 123456, 1234567, *range(10_000))
# Numbers that are drawn for one table. They are a minute's work; fewer seeds are tried for a very high rank.
_MOST_DRAWS = 5 * 10**10
_SEEN = 1024  # values of a module's A that are compared
_LEAST_AGREEMENT = 0.2  # least cosine of A and its initial values; with less in common, knowing the seed saves nothing
_SURE = 6.0  # standard deviations of the cosine of unrelated values
_RECENT = 16  # seeds found lately, which are tried first
# Tables in memory, 10 MB each: one for each rank and width of modules, three for a Llama with all modules targeted.
_TABLES = 16
_ROWS = 128  # of a table that are compared at a time: as floats they fit a processor's cache


class SeedSearch:
    """Finds seeds; seeds found lately are tried first, and draws of all seeds are cached between adapters."""

    def __init__(self, seeds: Sequence[int] = SEEDS) -> None:
        self._seeds = seeds
        self._recent: deque[int] = deque(maxlen=_RECENT)
        self._table = lru_cache(_TABLES)(partial(_Table, seeds))

    def find(self, adapter: Adapter) -> InitialA | None:
        """Return where an adapter's initial A was drawn, None if no seed gives it."""
        # The adapter must be as its trainer wrote it: the canonical gauge mixes the rows of A.
        for seed in chain(tuple(self._recent), self._candidates(adapter)):
            if found := initial_under(adapter, seed):
                if seed not in self._recent:
                    self._recent.appendleft(seed)
                return found
        return None

    def _candidates(self, adapter: Adapter) -> Iterator[int]:
        """Yield the seeds under which some module can have been the first that PEFT made."""
        for module in _first_layer(adapter.modules):
            head = _head(module)
            agreements = self._table(_before(module), len(head)).agreements(head)
            for number in np.flatnonzero(agreements > _least(len(head))).tolist():
                yield self._seeds[number]


def initial_under(adapter: Adapter, seed: int) -> InitialA | None:
    """Return where an adapter's initial A was drawn if it was this seed; the adapter is as its trainer wrote it."""
    found = _followed(adapter, seed)
    return InitialA(seed, found) if found else None


def _draws(seeds: Sequence[int], offset: int, count: int) -> NDArray[np.int8]:
    """Return the draws of every seed at one offset, in 127ths, shape (seeds, count)."""
    seeds = seeds[: max(1, _MOST_DRAWS // (offset + count))]
    table = np.empty((len(seeds), count), dtype=np.int8)
    stream = UniformStream(0)
    for row, seed in zip(table, seeds, strict=True):
        stream.restart(seed)
        row[:] = stream.read(offset, count) * 127
    return table


class _Table:
    """The draws of every seed at one offset, and the length of each row of them."""

    def __init__(self, seeds: Sequence[int], offset: int, count: int) -> None:
        self._draws = _draws(seeds, offset, count)
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


def _first_layer(modules: Sequence[LoraModule]) -> list[LoraModule]:
    """Return the module with the lowest layer number of each kind; PEFT made one of them first."""
    kinds: dict[ModuleKind, LoraModule] = {}
    for module in modules:  # in natural order
        kinds.setdefault(kind_of(module.shape)[0], module)
    return list(kinds.values())


def _followed(adapter: Adapter, seed: int) -> tuple[InitialModule, ...]:
    """Return the modules that PEFT made one after the other under a seed, up to the first that does not fit."""
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
            fits[name] = float((rows @ head / _lengths(rows))[0]) / _least(len(head))
        best = max(fits, key=fits.__getitem__)
        if fits[best] <= 1:  # not better than chance
            break
        module, _ = waiting.pop(best)
        done.append(InitialModule(position + _before(module), module.shape))
        drawn, position = drawn[done[-1].end - position :], done[-1].end
    return tuple(done)


def _before(module: LoraModule) -> int:
    """Return how many numbers PEFT draws for a module before the A that training begins with."""
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


def _least(count: int) -> float:
    """Return the cosine from which so many values agree by more than chance."""
    return max(_LEAST_AGREEMENT, _SURE / math.sqrt(count))
