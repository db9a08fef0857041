"""Range coding of integers whose scale is known: one pass per scale index, through `constriction`."""

from __future__ import annotations

import constriction
import numpy as np
from numpy.typing import NDArray

from icmlora.errors import CodeError
from icmlora.generator.scales import LARGEST, SMALLEST, probabilities, reach_of

Integers = NDArray[np.int32]


def clip(values: Integers, scales: Integers) -> Integers:
    """Limit integers to what their scale's table can express."""
    reach = _REACH[scales - SMALLEST]
    return np.clip(values, -reach, reach).astype(np.int32)


class Writer:
    """Appends integers to one stream of range-coded words."""

    def __init__(self) -> None:
        self._coder = constriction.stream.queue.RangeEncoder()

    def write(self, values: Integers, scales: Integers) -> None:
        """Append integers of shape (n,), each within the reach of its scale index in `scales`, shape (n,)."""
        for index, places in _groups(scales):
            symbols = (values[places] + reach_of(index)).astype(np.int32)
            self._coder.encode(symbols, _model(index))

    def to_bytes(self) -> bytes:
        """Return the stream as little-endian 32-bit words."""
        return bytes(self._coder.get_compressed().astype("<u4").tobytes())


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
        try:
            for index, places in _groups(scales):
                values[places] = self._coder.decode(_model(index), len(places)) - reach_of(index)
        except AssertionError as error:  # constriction's word for data that no encoder produces
            raise CodeError("the code's integers are damaged") from error
        return values

    def finish(self) -> None:
        """Check that nothing is left.

        Raises:
            CodeError: The stream holds more than was read.
        """
        if not self._coder.maybe_exhausted():
            raise CodeError("the code holds more integers than it announces")


def _groups(scales: Integers) -> list[tuple[int, NDArray[np.int64]]]:
    order = np.argsort(scales, kind="stable")
    found, starts = np.unique(scales[order], return_index=True)
    return [(int(index), places) for index, places in zip(found, np.split(order, starts[1:]), strict=True)]


def _model(index: int) -> object:
    return constriction.stream.model.Categorical(probabilities(index), perfect=False)


_REACH = np.array([reach_of(index) for index in range(SMALLEST, LARGEST + 1)], dtype=np.int32)
