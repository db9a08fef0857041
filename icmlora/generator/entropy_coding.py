"""ANS coding of integers whose scales are known, by `constriction`; its cost follows those that are not zero.

    integers of scale index -32 | ... | of scale index 64 | excess of the integers beyond their table

Where the scale is large, or few integers share it, each of them is a symbol of the scale's table. Elsewhere nearly all
are zero, and what is written is where the others are, and what they are:

    how rare they are, in eighths of an octave | how many, in the range which that leaves | gaps before them | values

A magnitude below the table's reach is one symbol. The reach itself announces a larger magnitude, whose excess follows
as an Elias gamma code: the number of bits, then the bits. So no value is cut off, however wrong its scale is. The same
holds for gaps.

The coder is a stack (asymmetric numeral systems, Duda, arXiv 1311.2540): what is read first is written last. So a
writer collects its symbols until it knows all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import constriction
import numpy as np
from numpy.typing import NDArray

from icmlora.errors import CodeError
from icmlora.generator.scales import (
    RARITIES,
    SMALLEST,
    gap_frequencies,
    nonzero_probabilities,
    nonzero_share,
    probabilities,
    rarity_bounds,
    reach_of,
    usual_rarity,
)

Integers = NDArray[np.int32]
Places = NDArray[np.int64]
Scales = NDArray[np.signedinteger[Any]]  # scale indices, in whatever width; they fit in one byte

# Largest magnitude that can be written. Larger ones would mean a quantiser step below the resolution of float32.
LIMIT = 1 << 20

_SPARSE = 0.4  # share of nonzeros below which gaps take less time than zeros
_MANY = 1024  # integers of one scale, of which so many are worth saying how many are not zero
_SHORT = 17  # symbols up to which a lazy model, which goes through them from the first on, decodes faster
_LENGTHS = 32  # longest excess, in bits after the leading one, plus one
_EVEN = 12  # bits of an even number that are written at a time


@dataclass(frozen=True, eq=False)
class ScaleGroup:
    """The integers of one scale that are not zero."""

    scale: int
    count: int  # all integers of that scale
    places: Places  # which of them are not zero, ascending, shape (k,)
    values: Integers  # shape (k,)

    @classmethod
    def of(cls, scale: int, values: Integers) -> ScaleGroup:
        """Find those of a scale's integers that are not zero."""
        places = np.flatnonzero(values != 0)  # of booleans: several times as fast as of integers
        return cls(scale, len(values), places, values.take(places))


def clip(values: NDArray[np.float64]) -> Integers:
    """Turn whole numbers of any shape into integers, clipped to those that can be written."""
    return np.clip(values, -LIMIT, LIMIT).astype(np.int32)


class IntegerWriter:
    """Collects integers, and writes them as one stream of words."""

    def __init__(self) -> None:
        self._passes: list[tuple[Integers, object]] = []  # symbols and their model, in the order of reading

    def write(self, values: Integers, scales: Scales) -> None:
        """Append integers of shape (n,), at most `LIMIT` in magnitude, under their scale indices, shape (n,)."""
        self.write_groups(ScaleGroup.of(scale, values.take(places)) for scale, places in _by_scale(scales))

    def write_groups(self, groups: Iterable[ScaleGroup]) -> None:
        """Append the integers of several scales."""
        beyond = [self._write_group(group) for group in groups]
        self._write_excess(np.concatenate(beyond) if beyond else np.zeros(0, dtype=np.int32))

    def to_bytes(self) -> bytes:
        """Return the stream as little-endian 32-bit words."""
        coder = constriction.stream.stack.AnsCoder()
        for symbols, model in reversed(self._passes):
            coder.encode_reverse(symbols, model)
        return bytes(coder.get_compressed().astype("<u4").tobytes())

    def _write_group(self, group: ScaleGroup) -> Integers:
        """Append the integers of a scale; returns what of them is beyond its table, from 1 on."""
        reach = reach_of(group.scale)
        short = np.clip(group.values, -reach, reach)
        if _is_sparse(group.scale, group.count):
            self._write_places(group.scale, group.count, group.places)
            self._append(short + reach - (short > 0), _values_model(group.scale))
        else:
            symbols = np.full(group.count, reach, dtype=np.int32)
            symbols[group.places] += short
            self._append(symbols, _model(group.scale))
        magnitudes = np.abs(group.values)
        return magnitudes[magnitudes >= reach] - (reach - 1)

    def _write_places(self, scale: int, count: int, places: Places) -> None:
        """Append which integers of a scale are not zero."""
        rarity = _rarity_of(len(places), count)
        symbol = RARITIES if rarity is None else rarity - usual_rarity(scale)
        self._append(np.array([symbol + RARITIES]), _rarity_model(is_none_likely=count * nonzero_share(scale) < 1))
        if rarity is None:
            return
        low, high = _range_of(rarity, count)
        self._write_even(np.array([len(places) - low]), high - low + 1)
        shift, last, model = _gap_model(rarity)
        gaps = np.diff(places, prepend=-1) - 1
        high_bits = gaps >> shift
        self._append(np.minimum(high_bits, last), model)
        self._write_excess(high_bits[high_bits >= last] - (last - 1))
        self._write_even(gaps & ((1 << shift) - 1), 1 << shift)

    def _write_excess(self, excess: NDArray[np.signedinteger[Any]]) -> None:
        """Append positive integers by their lengths, then by their bits after the leading one."""
        if not len(excess):
            return
        lengths = np.frexp(excess.astype(np.float64))[1] - 1  # floor(log2), exactly
        self._append(lengths, _EXCESS)
        for length, places in _places_of(lengths.astype(np.uint8)):
            self._write_even(excess[places] - (1 << length), 1 << length)

    def _write_even(self, values: NDArray[np.signedinteger[Any]], count: int) -> None:
        """Append numbers from 0 to below a count, all as likely."""
        if count > 1 << _EVEN:
            self._write_even(values >> _EVEN, ((count - 1) >> _EVEN) + 1)
            values, count = values & ((1 << _EVEN) - 1), 1 << _EVEN
        if count > 1:
            self._append(values, constriction.stream.model.Uniform(count))

    def _append(self, symbols: NDArray[np.signedinteger[Any]], model: object) -> None:
        self._passes.append((symbols.astype(np.int32), model))


class IntegerReader:
    """Reads what `IntegerWriter` wrote, in the same order and under the same scales."""

    def __init__(self, data: bytes) -> None:
        if len(data) % 4:
            raise CodeError("the code's integers end in the middle of a word")
        try:
            self._coder = constriction.stream.stack.AnsCoder(np.frombuffer(data, dtype="<u4").astype(np.uint32))
        except ValueError as error:
            raise _damaged() from error

    def read(self, scales: Scales) -> Integers:
        """Read integers, shape (n,)."""
        values = np.zeros(len(scales), dtype=np.int32)
        by_scale = list(_by_scale(scales))
        groups = self.read_groups([(scale, len(places)) for scale, places in by_scale])
        for (_, places), group in zip(by_scale, groups, strict=True):
            values[places.take(group.places)] = group.values
        return values

    def read_groups(self, sizes: Sequence[tuple[int, int]]) -> list[ScaleGroup]:
        """Read the integers of several scales, given as (scale, count)."""
        try:
            groups = [self._read_group(*size) for size in sizes]
            at_reach = [np.flatnonzero(np.abs(group.values) == reach_of(group.scale)) for group in groups]
            excess = self._read_excess(sum(map(len, at_reach))) - 1
        except (AssertionError, ValueError) as error:  # what constriction raises for data that no encoder produces
            raise _damaged() from error
        begin = 0
        for group, places in zip(groups, at_reach, strict=True):
            group.values[places] += np.sign(group.values[places]) * excess[begin : begin + len(places)]
            begin += len(places)
        return groups

    def _read_group(self, scale: int, count: int) -> ScaleGroup:
        reach = reach_of(scale)
        if _is_sparse(scale, count):
            places = self._read_places(scale, count)
            values = self._coder.decode(_values_model(scale), len(places)) - reach
            values += values >= 0
            return ScaleGroup(scale, count, places, values)
        return ScaleGroup.of(scale, self._coder.decode(_model(scale), count) - reach)

    def _read_places(self, scale: int, count: int) -> Places:
        model = _rarity_model(is_none_likely=count * nonzero_share(scale) < 1)
        symbol = int(self._coder.decode(model)) - RARITIES
        if symbol == RARITIES:
            return np.zeros(0, dtype=np.int64)
        rarity = symbol + usual_rarity(scale)
        low, high = _range_of(rarity, count) if 0 <= rarity < RARITIES else (1, 0)
        if low > high:
            raise _damaged()
        found = low + int(self._read_even(1, high - low + 1)[0])
        shift, last, model = _gap_model(rarity)
        gaps = self._coder.decode(model, found).astype(np.int64)
        long = np.flatnonzero(gaps == last)
        gaps[long] += self._read_excess(len(long)) - 1
        if shift:
            gaps = (gaps << shift) + self._read_even(found, 1 << shift)
        gaps += 1
        places: Places = np.cumsum(gaps, out=gaps)
        if places[-1] > count:
            raise _damaged()
        places -= 1
        return places

    def _read_excess(self, count: int) -> Integers:
        excess = np.ones(count, dtype=np.int32)
        if count:
            lengths = self._coder.decode(_EXCESS, count)
            for length, places in _places_of(lengths.astype(np.uint8)):
                excess[places] = (1 << length) + self._read_even(len(places), 1 << length)
        return excess

    def _read_even(self, count: int, below: int) -> NDArray[np.int64]:
        values = np.zeros(count, dtype=np.int64)
        bits = 0
        if below > 1 << _EVEN:
            values, bits, below = self._read_even(count, ((below - 1) >> _EVEN) + 1), _EVEN, 1 << _EVEN
        if below > 1:
            values = (values << bits) + self._coder.decode(constriction.stream.model.Uniform(below), count)
        return values


def _damaged() -> CodeError:
    return CodeError("the code's integers are damaged")


def _is_sparse(scale: int, count: int) -> bool:
    return count >= _MANY and nonzero_share(scale) < _SPARSE


def _rarity_of(nonzeros: int, count: int) -> int | None:
    """Return how rare nonzeros are, in eighths of an octave; None if there are none."""
    if not nonzeros:
        return None
    return int(np.flatnonzero((count * rarity_bounds() >> 32) < nonzeros)[0])


def _range_of(rarity: int, count: int) -> tuple[int, int]:
    """Return the smallest and largest number of nonzeros of a rarity."""
    bounds = rarity_bounds()
    return (count * int(bounds[rarity]) >> 32) + 1, (count * int(bounds[rarity - 1]) >> 32) if rarity else count


def _by_scale(scales: Scales) -> Iterator[tuple[int, Places]]:
    """Yield each scale index with its places, both ascending."""
    return ((key + SMALLEST, places) for key, places in _places_of((scales - SMALLEST).astype(np.uint8)))


def _places_of(keys: NDArray[np.uint8]) -> Iterator[tuple[int, Places]]:
    """Yield each key with its places, both ascending."""
    # A stable sort of single bytes is a radix sort in numpy, so this takes linear time.
    order = np.argsort(keys, kind="stable")
    found = np.arange(int(keys.max(initial=0)) + 1, dtype=np.uint8)  # of another type, all keys would be converted
    ends = np.searchsorted(keys.take(order), found, side="right")
    start = 0
    for key, end in enumerate(ends.tolist()):
        if end > start:
            yield key, order[start:end]
        start = end


@cache
def _model(scale: int) -> object:
    return _categorical(probabilities(scale))


@cache
def _values_model(scale: int) -> object:
    return _categorical(nonzero_probabilities(scale))


@cache
def _gap_model(rarity: int) -> tuple[int, int, object]:
    """Return by how many bits gaps are shifted, the symbol of long ones, and the model."""
    shift, table = gap_frequencies(rarity)
    return shift, len(table) - 1, _categorical(table / table.sum())


@cache
def _rarity_model(*, is_none_likely: bool) -> object:
    """Return the model of the difference to the usual rarity, from -256 on; 256 stands for "none"."""
    distance = np.abs(np.arange(2 * RARITIES + 1) - RARITIES)
    chances = 0.75**distance + 1e-6
    chances[-1] = chances.sum() * (2.0 if is_none_likely else 0.02)
    return _categorical(chances / chances.sum())


def _categorical(chances: NDArray[np.float64]) -> object:
    return constriction.stream.model.Categorical(chances, perfect=False, lazy=len(chances) <= _SHORT)


_EXCESS = constriction.stream.model.Categorical(2.0 ** -np.arange(1.0, _LENGTHS + 1), perfect=False)
