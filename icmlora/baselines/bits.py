"""Integers of a few bits, packed without gaps."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def packed_size(count: int, bits: int) -> int:
    """Return the bytes that `count` integers of `bits` bits take."""
    return (count * bits + 7) // 8


def pack(values: NDArray[np.uint8], bits: int) -> bytes:
    """Pack integers below 2^bits, lowest bit first; the last byte is filled with zeros."""
    planes = (values.reshape(-1, 1) >> np.arange(bits, dtype=np.uint8)) & 1  # (count, bits)
    return np.packbits(planes.astype(np.uint8), bitorder="little").tobytes()


def unpack(data: bytes, bits: int, count: int) -> NDArray[np.uint8]:
    """Read `count` integers back."""
    flat = np.unpackbits(np.frombuffer(data, dtype=np.uint8), count=count * bits, bitorder="little")
    weights = (1 << np.arange(bits)).astype(np.uint8)
    return np.asarray((flat.reshape(count, bits) * weights).sum(axis=1), dtype=np.uint8)
