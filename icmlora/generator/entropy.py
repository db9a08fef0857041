"""Range coding of integers whose scale is known: one pass per scale index, through `constriction`.

A magnitude below the table's reach is one symbol. The reach itself announces a larger one, whose excess follows after
all symbols as an Elias gamma code: how many bits, then the bits. So no value is cut off, however wrong its scale is.
"""

from __future__ import annotations

import constriction
import numpy as np
from numpy.typing import NDArray

from icmlora.errors import CodeError
from icmlora.generator.scales import LARGEST, SMALLEST, probabilities, reach_of

Integers = NDArray[np.int32]

LIMIT = 1 << 20
"""Largest magnitude that can be written. Beyond it a quantiser step is below the resolution of float32."""

_LENGTHS = LIMIT.bit_length()
"""Longest excess, in bits after the leading one, plus one."""


def clip(values: NDArray[np.float64]) -> Integers:
    """Turn whole numbers into integers that can be written."""
    return np.clip(values, -LIMIT, LIMIT).astype(np.int32)


class Writer:
    """Appends integers to one stream of range-coded words."""

    def __init__(self) -> None:
        self._coder = constriction.stream.queue.RangeEncoder()

    def write(self, values: Integers, scales: Integers) -> None:
        """Append integers of shape (n,), at most `LIMIT` in magnitude, under their scale indices, shape (n,)."""
        reach = _REACH[scales - SMALLEST]
        symbols = np.clip(values, -reach, reach) + reach
        for index, places in _groups(scales):
            self._coder.encode(symbols[places], _model(index))
        beyond = np.abs(values) >= reach
        self._write_excess(np.abs(values[beyond]) - reach[beyond] + 1)

    def to_bytes(self) -> bytes:
        """Return the stream as little-endian 32-bit words."""
        return bytes(self._coder.get_compressed().astype("<u4").tobytes())

    def _write_excess(self, excess: Integers) -> None:
        """Append positive integers by their lengths, then by their bits after the leading one."""
        if not len(excess):
            return
        lengths = _lengths(excess)
        self._coder.encode(lengths, _EXCESS)
        for length, places in _groups(lengths):
            if length:
                self._coder.encode((excess[places] - (1 << length)).astype(np.int32), _bits(length))


class Reader:
    """Reads back what `Writer` wrote, in the same order and under the same scales."""

    def __init__(self, data: bytes) -> None:
        if len(data) % 4:
            raise CodeError("the code's integers end in the middle of a word")
        self._coder = constriction.stream.queue.RangeDecoder(np.frombuffer(data, dtype="<u4").astype(np.uint32))

    def read(self, scales: Integers) -> Integers:
        """Read integers, shape (n,).

        Raises:
            CodeError: Words that no encoder wrote.
        """
        values = np.zeros(len(scales), dtype=np.int32)
        reach = _REACH[scales - SMALLEST]
        try:
            for index, places in _groups(scales):
                values[places] = self._coder.decode(_model(index), len(places))
            values -= reach
            beyond = np.abs(values) == reach
            values[beyond] += np.sign(values[beyond]) * (self._read_excess(int(beyond.sum())) - 1)
        except AssertionError as error:  # constriction's word for data that no encoder produces
            raise CodeError("the code's integers are damaged") from error
        return values

    def _read_excess(self, count: int) -> Integers:
        if not count:
            return np.zeros(0, dtype=np.int32)
        lengths = self._coder.decode(_EXCESS, count)
        excess = np.ones(count, dtype=np.int32)
        for length, places in _groups(lengths):
            if length:
                excess[places] = (1 << length) + self._coder.decode(_bits(length), len(places))
        return excess


def _groups(keys: Integers) -> list[tuple[int, NDArray[np.int64]]]:
    """Return the places of each key, keys and places ascending."""
    order = np.argsort(keys, kind="stable")
    found, starts = np.unique(keys[order], return_index=True)
    return [(int(key), places) for key, places in zip(found, np.split(order, starts)[1:], strict=True)]


def _lengths(excess: Integers) -> Integers:
    """Return floor(log2) of positive integers, exactly."""
    return (np.frexp(excess.astype(np.float64))[1] - 1).astype(np.int32)


def _model(index: int) -> object:
    return constriction.stream.model.Categorical(probabilities(index), perfect=False)


def _bits(length: int) -> object:
    return constriction.stream.model.Uniform(1 << length)


_REACH = np.array([reach_of(index) for index in range(SMALLEST, LARGEST + 1)], dtype=np.int32)
_EXCESS = constriction.stream.model.Categorical(2.0 ** -np.arange(1.0, _LENGTHS + 1), perfect=False)
