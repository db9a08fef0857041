"""Matrices <-> bytes: bfloat16, int8, NF4, and uniform steps of 1 to 4 bits, with scales in bfloat16.

A row is one rank slot: a row of A, or a column of B (as B^T). Scales per row of B would be one for every r values.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

_BF16 = 2  # bytes
_CLIPS = torch.linspace(0.1, 1.0, 46)  # tried shares of the largest value that the outermost level stands for
# The code book of bitsandbytes' NF4 (Dettmers et al., arXiv 2305.14314): quantiles of a normal distribution.
_NF4 = torch.tensor(
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
     -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
     0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]
)  # fmt: skip


class ValueQuantizer(Protocol):
    """Turn a matrix into bytes, whose number follows from its shape, and back."""

    def size(self, rows: int, columns: int) -> int:
        """Return the bytes that a matrix takes."""
        ...

    def encode(self, values: torch.Tensor) -> bytes:
        """Serialise a float32 matrix of shape (rows, columns)."""
        ...

    def decode(self, data: bytes, rows: int, columns: int) -> torch.Tensor:
        """Read the matrix back as float32."""
        ...


@dataclass(frozen=True)
class Bf16:
    """Every value in bfloat16."""

    def size(self, rows: int, columns: int) -> int:
        """Return two bytes a value."""
        return _BF16 * rows * columns

    def encode(self, values: torch.Tensor) -> bytes:
        """Round to nearest even."""
        return _halves(values)

    def decode(self, data: bytes, rows: int, columns: int) -> torch.Tensor:
        """Widen exactly."""
        return _floats(data).reshape(rows, columns)


@dataclass(frozen=True)
class Int8:
    """8 bits a value, symmetric, one scale per row: the row's largest value is 127."""

    def size(self, rows: int, columns: int) -> int:
        """Return one byte a value and two a row."""
        return rows * (columns + _BF16)

    def encode(self, values: torch.Tensor) -> bytes:
        """Round to the nearest of 255 levels."""
        scales = _rounded(values.abs().amax(dim=1, keepdim=True) / 127)
        levels = torch.where(scales > 0, values / scales, 0.0).round().clamp(-127, 127)  # (rows, columns)
        return _halves(scales) + levels.to(torch.int8).numpy().tobytes()

    def decode(self, data: bytes, rows: int, columns: int) -> torch.Tensor:
        """Multiply levels and scales."""
        levels = np.frombuffer(data, dtype=np.int8, offset=_BF16 * rows).astype(np.float32)
        return torch.from_numpy(levels).reshape(rows, columns) * _floats(data[: _BF16 * rows]).reshape(rows, 1)


@dataclass(frozen=True)
class Nf4:
    """4 bits a value: the nearest of 16 published levels times the largest value of a block of 64."""

    block: int = 64

    def size(self, rows: int, columns: int) -> int:
        """Return half a byte a value and two bytes a block."""
        return packed_size(rows * columns, 4) + _BF16 * self._blocks(rows * columns)

    def encode(self, values: torch.Tensor) -> bytes:
        """Take the nearest level; blocks run on over the ends of rows, as in bitsandbytes."""
        count = values.numel()
        blocks = self._blocks(count)
        padded = torch.nn.functional.pad(values.reshape(-1), (0, blocks * self.block - count)).reshape(-1, self.block)
        scales = _rounded(padded.abs().amax(dim=1, keepdim=True))
        unit = torch.where(scales > 0, padded / scales, 0.0)
        # Borders half way between two levels.
        nearest = torch.bucketize(unit, (_NF4[1:] + _NF4[:-1]) / 2).reshape(-1)[:count]
        return _halves(scales) + pack(nearest.numpy().astype(np.uint8), 4)

    def decode(self, data: bytes, rows: int, columns: int) -> torch.Tensor:
        """Look the levels up and multiply."""
        count = rows * columns
        scales = _floats(data[: _BF16 * self._blocks(count)]).repeat_interleave(self.block)[:count]
        levels = unpack(data[_BF16 * self._blocks(count) :], 4, count)
        return (_NF4[torch.from_numpy(levels).long()] * scales).reshape(rows, columns)

    def _blocks(self, count: int) -> int:
        return -(-count // self.block)


@dataclass(frozen=True)
class Uniform:
    """2^bits levels at -1/2, 1/2, 3/2 ... steps, of 46 steps the best one; one bit is the sign."""

    bits: int  # 1 to 4
    group: int | None = None  # values of a row that share a scale; None for the whole row
    # Choose the scale that gives a row its full length along the original, not the one of least error, which makes it
    # shorter. An adapter that is too weak loses more of its gain than the larger error costs.
    full: bool = False

    def size(self, rows: int, columns: int) -> int:
        """Return the bits of the values and two bytes a group."""
        return sum(self._piece_size(rows * count, width) for _, count, width in self._pieces(columns))

    def encode(self, values: torch.Tensor) -> bytes:
        """Search for the best clip of each group."""
        pieces = [
            values[:, start : start + count * width].reshape(-1, width)
            for start, count, width in self._pieces(values.shape[1])
        ]
        return b"".join(self._encode(piece) for piece in pieces)

    def decode(self, data: bytes, rows: int, columns: int) -> torch.Tensor:
        """Multiply levels and scales."""
        parts, at = [], 0
        for _, count, width in self._pieces(columns):
            end = at + self._piece_size(rows * count, width)
            parts.append(self._decode(data[at:end], rows * count, width).reshape(rows, count * width))
            at = end
        return torch.cat(parts, dim=1)

    def _pieces(self, columns: int) -> Iterator[tuple[int, int, int]]:
        """Yield first column, number and width of groups: all full groups together, then the rest of a row."""
        width = min(self.group or columns, columns)
        whole = columns // width
        yield 0, whole, width
        if columns % width:
            yield whole * width, 1, columns % width

    def _piece_size(self, groups: int, width: int) -> int:
        return _BF16 * groups + packed_size(groups * width, self.bits)

    def _encode(self, values: torch.Tensor) -> bytes:
        half = (1 << self.bits) // 2  # levels on either side of zero
        largest = values.abs().amax(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        kept = torch.full_like(largest, -1.0)
        levels = torch.zeros_like(values)
        for clip in _CLIPS if self.bits > 1 else _CLIPS[-1:]:
            tried = (values / (largest * clip / half)).floor().clamp(-half, half - 1) + 0.5
            # With the best scale for these levels the squared error is <x, x> - <x, q>^2 / <q, q>.
            explained = (values * tried).sum(1, keepdim=True) ** 2 / (tried * tried).sum(1, keepdim=True)
            levels = torch.where(explained > kept, tried, levels)
            kept = torch.maximum(kept, explained)
        codes = (levels - 0.5 + half).numpy().astype(np.uint8)
        return _halves(self._scales(values, levels)) + pack(codes, self.bits)

    def _decode(self, data: bytes, groups: int, width: int) -> torch.Tensor:
        scales = _floats(data[: _BF16 * groups]).reshape(groups, 1)
        levels = torch.from_numpy(unpack(data[_BF16 * groups :], self.bits, groups * width).astype(np.float32))
        return (levels.reshape(groups, width) + 0.5 - (1 << self.bits) / 2) * scales

    def _scales(self, values: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
        overlap = (values * levels).sum(dim=1, keepdim=True)  # (groups, 1)
        if not self.full:
            return overlap / (levels * levels).sum(dim=1, keepdim=True)
        return torch.where(overlap > 0, (values * values).sum(dim=1, keepdim=True) / overlap, 0.0)


def packed_size(count: int, bits: int) -> int:
    """Return the bytes that `count` integers of `bits` bits take."""
    return (count * bits + 7) // 8


def pack(values: NDArray[np.uint8], bits: int) -> bytes:
    """Pack integers below 2^bits without gaps, lowest bit first; the last byte is filled with zeros."""
    planes = (values.reshape(-1, 1) >> np.arange(bits, dtype=np.uint8)) & 1  # (count, bits)
    return np.packbits(planes.astype(np.uint8), bitorder="little").tobytes()


def unpack(data: bytes, bits: int, count: int) -> NDArray[np.uint8]:
    """Unpack `count` integers."""
    flat = np.unpackbits(np.frombuffer(data, dtype=np.uint8), count=count * bits, bitorder="little")
    weights = (1 << np.arange(bits)).astype(np.uint8)
    return np.asarray((flat.reshape(count, bits) * weights).sum(axis=1), dtype=np.uint8)


def _rounded(values: torch.Tensor) -> torch.Tensor:
    """Round scales as they are stored, so that levels are chosen for what the decoder sees."""
    return values.to(torch.bfloat16).float()


def _halves(values: torch.Tensor) -> bytes:
    return values.to(torch.bfloat16).contiguous().view(torch.int16).numpy().tobytes()


def _floats(data: bytes) -> torch.Tensor:
    # Through numpy, since torch refuses an empty buffer; the copy is what makes the memory torch's own.
    return torch.from_numpy(np.frombuffer(data, dtype=np.int16).copy()).view(torch.bfloat16).float()
