"""Range coding of integers of known scales, a pass for each scale index, by `constriction` (Bamler, arXiv 2201.01741).

    integers of scale index -32 | ... | of scale index 64 | excess of the integers beyond their table

A magnitude below the table's reach is one symbol. The reach itself announces a larger magnitude, whose excess follows
after all symbols as an Elias gamma code (Elias 1975): the number of bits, then the bits. So no value is cut off,
however wrong its scale is.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import constriction
import numpy as np
from numpy.typing import NDArray

from icmlora.errors import CodeError
from icmlora.generator.scales import LARGEST, SMALLEST, probabilities, reach_of

Integers = NDArray[np.int32]
Scales = NDArray[np.signedinteger[Any]]  # scale indices, in whatever width; they fit in one byte

# Largest magnitude that can be written. Larger ones would mean a quantiser step below the resolution of float32.
LIMIT = 1 << 20

_LARGEST_LAZY = -12  # scale index up to which a lazy model decodes faster

_LENGTHS = LIMIT.bit_length()  # longest excess, in bits after the leading one, plus one


def clip(values: NDArray[np.float64]) -> Integers:
    """Turn whole numbers of any shape into integers, clipped to those that can be written."""
    return np.clip(values, -LIMIT, LIMIT).astype(np.int32)


class IntegerWriter:
    """Appends integers to one stream of range-coded words."""

    def __init__(self) -> None:
        self._coder = constriction.stream.queue.RangeEncoder()

    def write(self, values: Integers, scales: Scales) -> None:
        """Append integers of shape (n,), at most `LIMIT` in magnitude, under their scale indices, shape (n,)."""
        beyond = []
        for index, places in _groups(_keys(scales)):
            found, reach = values.take(places), reach_of(index + SMALLEST)
            # Symbols count from 0; symbols 0 and 2 * reach announce a magnitude of `reach` or more.
            self._coder.encode(np.clip(found, -reach, reach) + reach, _model(index + SMALLEST))
            beyond.append(places[np.abs(found) >= reach])
        ends = _ascending(beyond)
        self._write_excess(np.abs(values[ends]) - _REACH[scales[ends] - SMALLEST] + 1)

    def to_bytes(self) -> bytes:
        """Return the stream as little-endian 32-bit words."""
        return bytes(self._coder.get_compressed().astype("<u4").tobytes())

    def _write_excess(self, excess: Integers) -> None:
        """Append positive integers by their lengths, then by their bits after the leading one."""
        if not len(excess):
            return
        lengths = (np.frexp(excess.astype(np.float64))[1] - 1).astype(np.int32)  # floor(log2), exactly
        self._coder.encode(lengths, _EXCESS)
        for length, places in _groups(lengths.astype(np.uint8)):
            if length:
                self._coder.encode((excess[places] - (1 << length)).astype(np.int32), _bits(length))


class IntegerReader:
    """Reads what `IntegerWriter` wrote, in the same order and under the same scales."""

    def __init__(self, data: bytes) -> None:
        if len(data) % 4:
            raise CodeError("the code's integers end in the middle of a word")
        self._coder = constriction.stream.queue.RangeDecoder(np.frombuffer(data, dtype="<u4").astype(np.uint32))

    def read(self, scales: Scales) -> Integers:
        """Read integers, shape (n,), under their scale indices (n,); raise `CodeError` if no encoder wrote them."""
        values = np.empty(len(scales), dtype=np.int32)
        beyond = []
        try:
            for index, places in _groups(_keys(scales)):
                reach = reach_of(index + SMALLEST)
                found = self._coder.decode(_reading_model(index + SMALLEST), len(places))
                found -= reach
                values[places] = found
                beyond.append(places[np.abs(found) == reach])
            ends = _ascending(beyond)
            values[ends] += np.sign(values[ends]) * (self._read_excess(len(ends)) - 1)
        except AssertionError as error:  # what constriction raises for data that no encoder produces
            raise CodeError("the code's integers are damaged") from error
        return values

    def _read_excess(self, count: int) -> Integers:
        if not count:
            return np.zeros(0, dtype=np.int32)
        lengths = self._coder.decode(_EXCESS, count)
        excess = np.ones(count, dtype=np.int32)
        for length, places in _groups(lengths.astype(np.uint8)):
            if length:
                excess[places] = (1 << length) + self._coder.decode(_bits(length), len(places))
        return excess


def _keys(scales: Scales) -> NDArray[np.uint8]:
    """Return scale indices counted from 0, in one byte each."""
    return (scales - SMALLEST).astype(np.uint8)


def _groups(keys: NDArray[np.uint8]) -> Iterator[tuple[int, NDArray[np.int64]]]:
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


def _ascending(places: list[NDArray[np.int64]]) -> NDArray[np.int64]:
    return np.sort(np.concatenate(places)) if places else np.zeros(0, dtype=np.int64)


@cache
def _model(index: int) -> object:
    return constriction.stream.model.Categorical(probabilities(index), perfect=False)


@cache
def _reading_model(index: int) -> object:
    """Return the same model in the form that decodes fastest."""
    # A lazy model goes through the symbols from the first on. For up to 17 symbols that takes two thirds of the time of
    # a binary search, and most integers have such a small scale.
    return constriction.stream.model.Categorical(probabilities(index), perfect=False, lazy=index <= _LARGEST_LAZY)


def _bits(length: int) -> object:
    return constriction.stream.model.Uniform(1 << length)


_REACH = np.array([reach_of(index) for index in range(SMALLEST, LARGEST + 1)], dtype=np.int32)
_EXCESS = constriction.stream.model.Categorical(2.0 ** -np.arange(1.0, _LENGTHS + 1), perfect=False)
