"""ANS coding of integers with known scales, by `constriction`; its cost depends on the nonzeros.

    integers of scale index -32 | ... | of scale index 64 | excess of the integers beyond their table

Where the scale is large, or few integers share it, each integer is a symbol of the scale's table. Elsewhere nearly all
are zero, and only the nonzeros are written:

    their rarity, in eighths of an octave | their number, within the range of that rarity | gaps before them | values

A magnitude below the table's reach is one symbol. The reach itself announces that magnitude or a larger one, whose
excess follows as an Elias gamma code: the number of bits, then the bits. So no value is cut off, however wrong its
scale is. The same holds for gaps.

The coder is a stack (asymmetric numeral systems, Duda, arXiv 1311.2540): the first symbol read is the last one written.
So a writer first collects all of its symbols.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, cached_property, reduce
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
Scales = NDArray[np.signedinteger[Any]]  # scale indices, in any width; they fit in one byte
Sizes = Sequence[tuple[int, int]]  # scale indices, ascending, each with the number of its integers

# Largest magnitude that can be written. Larger ones would mean a quantiser step below the resolution of float32.
LIMIT = 1 << 20

_SPARSE = 0.25  # share of nonzeros below which gaps take less time than zeros
_MANY = 1024  # minimum integers of one scale for gaps and joint symbols to pay off
_MAX_SYMBOLS = 9**4  # of a joint table; larger tables outgrow the processor's nearest cache
_LENGTHS = 32  # longest excess, in bits after the leading one, plus one
_EVEN = 12  # bits of a uniform number that are written at a time


class Alphabet:
    """K small integers with their probabilities; long sequences combine several into one symbol.

    A decoder finds a symbol in its table by bisection, so one among 2,400 takes less time than four among seven. The
    joint table is the product of the single ones, so the bits are the same.
    """

    def __init__(self, integers: NDArray[np.int64], chances: NDArray[np.float64]) -> None:
        """Build the tables from ascending integers and their probabilities, both of shape (K,)."""
        self._integers, self._chances = integers.astype(np.int32), chances
        self._together = next((count for count in (4, 2) if len(chances) ** count <= _MAX_SYMBOLS), 1)
        self._single = _categorical(chances)

    def symbols(self, values: NDArray[np.signedinteger[Any]]) -> list[tuple[NDArray[np.int32], object]]:
        """Return the symbols of integers (n,) in reading order, as parts with their models."""
        low = self._integers[0]
        symbols = np.zeros(self._integers[-1] - low + 1, dtype=np.int32)
        symbols[self._integers - low] = np.arange(len(self._integers))
        singles = symbols.take(values - low)
        joint = self._joint_count(len(values))
        end = joint * self._together
        digits = singles[:end].reshape(joint, self._together)
        weights = len(self._chances) ** np.arange(self._together - 1, -1, -1)
        several = [((digits @ weights).astype(np.int32), self._joint[0])] if joint else []
        return [*several, (singles[end:], self._single)]

    def read(self, coder: constriction.stream.stack.AnsCoder, count: int) -> NDArray[np.signedinteger[Any]]:
        """Read `count` integers, shape (count,)."""
        joint = self._joint_count(count)
        if not joint:
            few: NDArray[np.int32] = self._integers.take(coder.decode(self._single, count))
            return few
        model, digits = self._joint
        found = np.empty(count, dtype=np.int8)
        end = joint * self._together
        digits.take(coder.decode(model, joint), out=found[:end].view(digits.dtype), mode="clip")
        found[end:] = self._integers.take(coder.decode(self._single, count - end))
        return found

    def _joint_count(self, count: int) -> int:
        """Return how many joint symbols `count` integers take; the rest follow one at a time."""
        return count // self._together if self._together > 1 and count >= _MANY else 0

    @cached_property
    def _joint(self) -> tuple[object, NDArray[np.unsignedinteger[Any]]]:
        """Return the model of joint symbols, and each symbol's integers, a byte each."""
        chances = reduce(np.multiply.outer, [self._chances] * self._together).ravel()
        digits = np.stack(np.meshgrid(*[self._integers] * self._together, indexing="ij"), axis=-1)
        return _categorical(chances), digits.astype(np.int8).reshape(len(chances), -1).view(f"u{self._together}")[:, 0]


def clip(values: NDArray[np.float64]) -> Integers:
    """Convert whole numbers of any shape to integers, clipped to the writable range."""
    return np.clip(values, -LIMIT, LIMIT).astype(np.int32)


class IntegerWriter:
    """Collects integers, and writes them as one stream of words."""

    def __init__(self) -> None:
        self._passes: list[tuple[Integers, object]] = []  # symbols and their model, in the order of reading

    def write(self, values: Integers, scales: Scales) -> None:
        """Append integers of shape (n,), at most `LIMIT` in magnitude, under their scale indices, shape (n,)."""
        order, sizes = _by_scale(scales)
        ordered = values.take(order)
        places = np.flatnonzero(ordered != 0)  # several times as fast on booleans as on integers
        self.write_nonzeros(sizes, places, ordered.take(places))

    def write_nonzeros(self, sizes: Sizes, places: Places, values: Integers) -> None:
        """Append the integers of several scales, given the ascending places and the values of their k nonzeros."""
        excess, begin = [np.zeros(0, dtype=np.int32)], 0  # of integers beyond their table, from 1 on
        for scale, count in sizes:
            low, high = np.searchsorted(places, [begin, begin + count]).tolist()
            here, found, reach = places[low:high] - begin, values[low:high], reach_of(scale)
            short = np.clip(found, -reach, reach)
            if _is_sparse(scale, count):
                self._write_places(scale, count, here)
                self._passes += _nonzeros(scale).symbols(short)
            else:
                dense = np.zeros(count, dtype=np.int32)
                dense[here] = short
                self._passes += _integers(scale).symbols(dense)
            magnitudes = np.abs(found)
            excess.append(magnitudes[magnitudes >= reach] - (reach - 1))
            begin += count
        self._write_excess(np.concatenate(excess))

    def to_bytes(self) -> bytes:
        """Return the stream as little-endian 32-bit words."""
        coder = constriction.stream.stack.AnsCoder()
        for symbols, model in reversed(self._passes):
            coder.encode_reverse(symbols, model)
        return bytes(coder.get_compressed().astype("<u4").tobytes())

    def _write_places(self, scale: int, count: int, places: Places) -> None:
        """Append the places of a scale's nonzeros."""
        rarity = RARITIES + usual_rarity(scale)  # if there are none
        if len(places):
            rarity = int(np.flatnonzero((count * rarity_bounds() >> 32) < len(places))[0])
        symbol = rarity - usual_rarity(scale) + RARITIES
        self._append(np.array([symbol]), _rarity_model(is_none_likely=count * nonzero_share(scale) < 1))
        if not len(places):
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
        """Append positive integers: their lengths, then their bits after the leading one."""
        if not len(excess):
            return
        lengths = np.frexp(excess.astype(np.float64))[1] - 1  # floor(log2), exactly
        self._append(lengths, _EXCESS)
        for length in np.unique(lengths).tolist():
            self._write_even(excess[lengths == length] - (1 << length), 1 << length)

    def _write_even(self, values: NDArray[np.signedinteger[Any]], count: int) -> None:
        """Append uniformly distributed numbers from 0 to below a count."""
        if count > 1 << _EVEN:
            self._write_even(values >> _EVEN, ((count - 1) >> _EVEN) + 1)
            values, count = values & ((1 << _EVEN) - 1), 1 << _EVEN
        if count > 1:
            self._append(values, _even_model(count))

    def _append(self, symbols: NDArray[np.signedinteger[Any]], model: object) -> None:
        self._passes.append((symbols.astype(np.int32), model))


class IntegerReader:
    """Reads the output of `IntegerWriter`, in the same order and under the same scales."""

    def __init__(self, data: bytes) -> None:
        if len(data) % 4:
            raise CodeError("the code's integers end within a word")
        try:
            self._coder = constriction.stream.stack.AnsCoder(np.frombuffer(data, dtype="<u4").astype(np.uint32))
        except ValueError as error:
            raise _damaged() from error

    def read(self, scales: Scales) -> Integers:
        """Read integers, shape (n,)."""
        order, sizes = _by_scale(scales)
        places, found = self.read_nonzeros(sizes)
        values = np.zeros(len(scales), dtype=np.int32)
        values[order.take(places)] = found
        return values

    def read_nonzeros(self, sizes: Sizes) -> tuple[Places, Integers]:
        """Read the integers of several scales; returns the nonzeros' ascending places and values, both (k,)."""
        of_places, of_values, of_reaches = [np.zeros(0, np.int64)], [np.zeros(0, np.int32)], [np.zeros(0, np.int32)]
        begin = 0
        try:
            for scale, count in sizes:
                if _is_sparse(scale, count):
                    here = self._read_places(scale, count)
                    found = _nonzeros(scale).read(self._coder, len(here))
                else:
                    dense = _integers(scale).read(self._coder, count)
                    here = (dense != 0).nonzero()[0]
                    found = dense.take(here)
                of_places.append(here + begin)
                of_values.append(found.astype(np.int32))
                of_reaches.append(np.full(len(here), reach_of(scale), dtype=np.int32))
                begin += count
            places, values = np.concatenate(of_places), np.concatenate(of_values)
            beyond = np.flatnonzero(np.abs(values) == np.concatenate(of_reaches))
            values[beyond] += np.sign(values[beyond]) * (self._read_excess(len(beyond)) - 1)
        except (AssertionError, ValueError) as error:  # constriction raises these for data that no encoder produces
            raise _damaged() from error
        return places, values

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
        long = (gaps == last).nonzero()[0]
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
            for length in np.unique(lengths).tolist():
                places = np.flatnonzero(lengths == length)
                excess[places] = (1 << length) + self._read_even(len(places), 1 << length)
        return excess

    def _read_even(self, count: int, below: int) -> Places:
        if below > 1 << _EVEN:
            high = self._read_even(count, ((below - 1) >> _EVEN) + 1)
            return (high << _EVEN) + self._read_even(count, 1 << _EVEN)
        if below == 1:
            return np.zeros(count, dtype=np.int64)
        even: Places = self._coder.decode(_even_model(below), count).astype(np.int64)
        return even


def _damaged() -> CodeError:
    return CodeError("the code's integers are damaged")


def _is_sparse(scale: int, count: int) -> bool:
    return count >= _MANY and nonzero_share(scale) < _SPARSE


def _range_of(rarity: int, count: int) -> tuple[int, int]:
    """Return the smallest and largest number of nonzeros of a rarity."""
    bounds = rarity_bounds()
    return (count * int(bounds[rarity]) >> 32) + 1, (count * int(bounds[rarity - 1]) >> 32) if rarity else count


def _by_scale(scales: Scales) -> tuple[Places, Sizes]:
    """Return the order that sorts integers by scale, and each scale with its number of integers."""
    # A stable sort of single bytes is a radix sort in numpy, so this takes linear time.
    keys = (scales - SMALLEST).astype(np.uint8)
    counts = np.bincount(keys).tolist()
    return np.argsort(keys, kind="stable"), [(key + SMALLEST, count) for key, count in enumerate(counts) if count]


@cache
def _integers(scale: int) -> Alphabet:
    return Alphabet(np.arange(-reach_of(scale), reach_of(scale) + 1), probabilities(scale))


@cache
def _nonzeros(scale: int) -> Alphabet:
    reach = reach_of(scale)
    return Alphabet(np.delete(np.arange(-reach, reach + 1), reach), nonzero_probabilities(scale))


@cache
def _gap_model(rarity: int) -> tuple[int, int, object]:
    """Return the shift of gaps in bits, the symbol of long gaps, and the model."""
    shift, table = gap_frequencies(rarity)
    return shift, len(table) - 1, _categorical(table / table.sum())


@cache
def _even_model(count: int) -> object:
    return constriction.stream.model.Uniform(count)


@cache
def _rarity_model(*, is_none_likely: bool) -> object:
    """Return the model of the difference from the usual rarity, from -256 on; 256 means "none"."""
    distance = np.abs(np.arange(2 * RARITIES + 1) - RARITIES)
    chances = 0.75**distance + 1e-6
    chances[-1] = chances.sum() * (2.0 if is_none_likely else 0.02)
    return _categorical(chances / chances.sum())


def _categorical(chances: NDArray[np.float64]) -> object:
    return constriction.stream.model.Categorical(chances, perfect=False, lazy=False)


_EXCESS = constriction.stream.model.Categorical(2.0 ** -np.arange(1.0, _LENGTHS + 1), perfect=False)
