"""Factors rounded to the lattice E8 and entropy coded, after EntroPack (Zhang, Duan and Chen, arXiv 2609.34185).

    row / its root mean square  --scale found for so many bits a value-->  nearest points of E8, 8 values each
    head | size (4) | zlib of  kept directions | class of each row | its scale | tables   | words of the entropy coder

EntroPack's package needs a CUDA card, so this is its quantiser and a coder of our own. It differs, each time to the
method's advantage on matrices as small as LoRA's:

- A point is coded as its shell, under a stored table, and its number among the points of its shell, all as likely.
  EntroPack codes eight coordinates with 17 tables, which cannot tell that most points are zero at less than a bit.
- All matrices of an adapter share one scale of the lattice and the tables; rows of one loudness share a table.
- Scales of rows are bfloat16, by least squares, and deflated. EntroPack has 4 bytes. Its search for another resolution
  of each row, off by default, is left out; `by_energy` does more.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import constriction
import numpy as np
import torch
from numpy.typing import NDArray

from icmlora.adapter.arithmetic import truncated
from icmlora.adapter.model import Adapter, LoraModule
from icmlora.errors import CodeError
from icmlora.generator.files.container import inflate
from tests.benchmarks.baselines import e8
from tests.benchmarks.baselines.baseline import PerAdapter
from tests.benchmarks.baselines.head import ByteReader, Head

_COARSEST, _FINEST = 10, -20  # log2 of the steps that are tried, in root mean squares of all values
_HALVINGS = 12  # of the octave in which the step is
_LARGEST_COUNT = 0xFFFF  # of a table's entry
_DIGIT = 12  # bits of a point's number that are coded at a time where it is long
_LONG = 22  # bits from which on it is
_STRONGEST = 4.0  # factor of a module's dW at most, as in icm's codes
_SIDE_LIMIT = 1 << 24  # bytes of what is deflated
_EMPTY = 1e-30  # keeps logarithms and divisions finite for rows of zeros

Whole = e8.Whole


@dataclass(frozen=True, eq=False)
class Rows:
    """Directions of an adapter's modules in steps of the lattice; A's rows of a module, then B's columns."""

    head: Head
    counts: list[int]  # kept directions of each module, at least 1
    blocks: torch.Tensor  # shape (n, 8), in steps; every row is filled up with zeros
    scales: torch.Tensor  # what a step of each row is, shape (R,)

    @property
    def lengths(self) -> torch.Tensor:
        """Blocks of each row, shape (R,)."""
        return torch.tensor([blocks for _, _, blocks in _sides(self.head, self.counts)])

    @property
    def row_of(self) -> torch.Tensor:
        """Row of each block, shape (n,)."""
        return torch.arange(len(self.scales)).repeat_interleave(self.lengths)

    @property
    def module_of(self) -> torch.Tensor:
        """Number of each row's module, shape (R,)."""
        return torch.tensor([module for module, _, _ in _sides(self.head, self.counts)])

    @property
    def is_output(self) -> torch.Tensor:
        """Whether a row is a column of B, shape (R,)."""
        return torch.tensor([output for _, output, _ in _sides(self.head, self.counts)])

    def factors(self, values: torch.Tensor) -> Iterator[tuple[str, tuple[torch.Tensor, torch.Tensor]]]:
        """Yield the A (k, in) and B (out, k) of each module from values for the blocks, with gradients."""
        flat, at = values.reshape(-1), 0
        for (name, _, inputs, outputs), count in zip(self.head.layout, self.counts, strict=True):
            sides = []
            for width in (inputs, outputs):
                end = at + count * e8.DIMENSION * _blocks(width)
                sides.append(flat[at:end].reshape(count, -1)[:, :width])
                at = end
            yield name, (sides[0], sides[1].mT)

    def adapter(self) -> Adapter:
        """Return what the rows are once they are rounded."""
        values = e8.nearest(self.blocks) * self.scales[self.row_of][:, None]
        modules = [LoraModule(name, a.contiguous(), b.contiguous()) for name, (a, b) in self.factors(values)]
        return self.head.with_modules(modules)

    def classes(self) -> Whole:
        """Return which table each row's points are coded under: by their mean squared length, two an octave."""
        sums = np.zeros(len(self.scales))
        np.add.at(sums, self.row_of.numpy(), np.square(self.doubled()).sum(axis=1))
        return np.rint(2 * np.log2(1 + sums / self.lengths.numpy())).astype(np.int64)

    def doubled(self) -> Whole:
        """Return the points that blocks are rounded to, times two."""
        return np.asarray((2 * e8.nearest(self.blocks)).long().numpy(), dtype=np.int64)


@dataclass(frozen=True)
class Lattice(PerAdapter):
    """Spend so many bits on each value, head and tables included, of an adapter as trained or cut to a rank."""

    bits: float
    rank: int | None = None
    full: bool = False  # dW of each module gets its full length along the original, which no publication has
    # Divide rows so that rounding costs dW as much everywhere: balanced rows times their length instead of rows at one
    # loudness. So the directions with little energy round to zero, and those with much get the bits.
    by_energy: bool = False

    def encode(self, adapter: Adapter, shared: bytes) -> bytes:
        """Find the step, round and serialise."""
        return to_bytes(self.rows(adapter))

    def decode(self, code: bytes, shared: bytes) -> Adapter:
        """Read it back."""
        return from_bytes(code)

    def rows(self, adapter: Adapter) -> Rows:
        """Return an adapter's rows in steps, not rounded yet."""
        kept = adapter
        if self.rank is not None or self.by_energy:
            kept = truncated(adapter, self.rank or max(shape.rank for shape in adapter.layout))
        budget = self.bits * sum(shape.parameters for shape in kept.layout)
        values, even = _all_rows(kept, by_energy=self.by_energy)
        # From coarse to fine, since fine steps take long and are seldom wanted.
        loud = math.log2(float(even.square().mean().sqrt()) + _EMPTY)
        high = loud + _COARSEST
        while high > loud + _FINEST and _size(_rounded_rows(values, even / 2.0 ** (high - 1))) <= budget:
            high -= 1
        low = high - 1
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            if _size(_rounded_rows(values, even / 2.0**middle)) > budget:
                low = middle
            else:
                high = middle
        found = _rounded_rows(values, even / 2.0**high)
        return _strengthened(found, kept) if self.full else found


def to_bytes(rows: Rows) -> bytes:
    """Round and serialise."""
    doubled = rows.doubled()
    shells, classes = e8.shells(doubled), rows.classes()
    tables = _tables(shells, classes[rows.row_of.numpy()])
    side = zlib.compress(_side(rows, classes, tables), 9)
    passes = []
    for kind, table in tables.items():
        if len(table) > 1:
            passes.append((shells[classes[rows.row_of.numpy()] == kind], _table_model(tuple(table.tolist()))))
    numbers, sizes = e8.numbers(doubled), e8.shell_sizes(int(shells.max(initial=0)))
    for shell in range(1, len(sizes)):
        passes += _digits(numbers[shells == shell], int(sizes[shell]))
    coder = constriction.stream.stack.AnsCoder()
    for symbols, model in reversed(passes):
        coder.encode_reverse(symbols.astype(np.int32), model)
    return (
        rows.head.to_bytes() + len(side).to_bytes(4, "little") + side + coder.get_compressed().astype("<u4").tobytes()
    )


def from_bytes(code: bytes) -> Adapter:
    """Read an adapter back."""
    reader = ByteReader(code)
    head = Head.read(reader)
    side = ByteReader(inflate(reader.take(reader.number(4)), 4, _SIDE_LIMIT))
    counts = np.frombuffer(side.take(2 * len(head.layout)), dtype="<u2").tolist()
    scales, classes, tables = _read_side(side, 2 * sum(counts))
    rows = Rows(head, counts, torch.zeros(0, e8.DIMENSION), scales)
    of_block = classes[rows.row_of.numpy()]
    words = reader.rest()
    if len(words) % 4:
        raise CodeError("the code ends in the middle of a word")
    coder = constriction.stream.stack.AnsCoder(np.frombuffer(words, dtype="<u4").astype(np.uint32))
    shells = np.zeros(len(of_block), dtype=np.int64)
    for kind, table in tables.items():
        places = np.flatnonzero(of_block == kind)
        if len(table) > 1:
            shells[places] = coder.decode(_table_model(tuple(table.tolist())), len(places))
    numbers, sizes = np.zeros_like(shells), e8.shell_sizes(int(shells.max(initial=0)))
    for shell in range(1, len(sizes)):
        places = np.flatnonzero(shells == shell)
        numbers[places] = _read_digits(coder, len(places), int(sizes[shell]))
    return replace(rows, blocks=torch.from_numpy(e8.points(shells, numbers)).float() / 2).adapter()


def point_bits(counts: NDArray[Any]) -> NDArray[np.float64]:
    """Return what a point of each shell costs under a table, in bits; shape of the counts, none of them 0."""
    return np.asarray(np.log2(e8.shell_sizes(len(counts) - 1)) - np.log2(counts / counts.sum()))


def _all_rows(adapter: Adapter, *, by_energy: bool) -> tuple[Rows, torch.Tensor]:
    """Return an adapter's rows as they are, and blocks in which rounding costs the same everywhere."""
    parts, loudness = [], []
    for module in adapter.modules:
        for matrix in (module.a, module.b.mT):
            parts.append(
                torch.nn.functional.pad(matrix, (0, -matrix.shape[1] % e8.DIMENSION)).reshape(-1, e8.DIMENSION)
            )
            lengths = matrix.square().sum(dim=1).sqrt()
            loudness.append(1 / lengths if by_energy else lengths / math.sqrt(matrix.shape[1]))
    counts = [shape.rank for shape in adapter.layout]
    rows = Rows(Head.of(adapter), counts, torch.cat(parts), torch.cat(loudness))
    return rows, torch.nan_to_num(rows.blocks / rows.scales[rows.row_of][:, None], posinf=0.0)


def _rounded_rows(values: Rows, steps: torch.Tensor) -> Rows:
    """Return the rows of which something is left when they are rounded, with scales of least error."""
    points, row_of = e8.nearest(steps), values.row_of
    sums = torch.zeros(2, len(values.scales), dtype=torch.float64)
    sums[0].index_add_(0, row_of, (values.blocks * points).double().sum(1))
    sums[1].index_add_(0, row_of, points.double().square().sum(1))
    # A direction is lost where A's row or B's column is; directions after the last one that is left are not stored.
    module_of = values.module_of
    slot_of = torch.cat([torch.arange(count).repeat(2) for count in values.counts])
    left = sums[1] > 0
    counts = []
    for module, count in enumerate(values.counts):
        mine = left[module_of == module].reshape(2, count).all(dim=0)
        left[module_of == module] = mine.repeat(2)
        counts.append(max(1, int(torch.arange(1, count + 1)[mine].max()) if mine.any() else 1))
    scales = torch.where(left, sums[0] / sums[1].clamp_min(_EMPTY), 0.0).float()
    kept = slot_of < torch.tensor(counts)[module_of]
    blocks = torch.where(left[row_of][:, None], steps, 0.0)[kept[row_of]]
    return Rows(values.head, counts, blocks, scales[kept])


def _strengthened(rows: Rows, original: Adapter) -> Rows:
    """Give each module's dW its full length along the original's, as far as the largest factor does."""
    factors = []
    for mine, theirs in zip(rows.adapter().modules, original.modules, strict=True):
        overlap = float(((mine.b.mT @ theirs.b) * (mine.a @ theirs.a.mT)).sum())
        whole = float(((theirs.b.mT @ theirs.b) * (theirs.a @ theirs.a.mT)).sum())
        factors.append(min(whole / overlap, _STRONGEST) if overlap > 0 else 1.0)
    by_row = torch.tensor(factors)[rows.module_of]
    return replace(rows, scales=rows.scales * torch.where(rows.is_output, by_row, 1.0))


def _size(rows: Rows) -> float:
    """Return the bits that rows take."""
    doubled = rows.doubled()
    shells, classes = e8.shells(doubled), rows.classes()
    tables = _tables(shells, classes[rows.row_of.numpy()])
    total = 8.0 * (len(rows.head.to_bytes()) + 4 + len(zlib.compress(_side(rows, classes, tables), 9)))
    for kind, table in tables.items():
        found = np.bincount(shells[classes[rows.row_of.numpy()] == kind], minlength=len(table))
        used = found > 0
        total += float((found[used] * point_bits(np.maximum(table, 1))[used]).sum())
    return total


def _tables(shells: Whole, classes: Whole) -> dict[int, Whole]:
    """Return how often each shell occurs among the points of each class, as far as it is stored."""
    found = {}
    for kind in np.unique(classes).tolist():
        counts = np.bincount(shells[classes == kind])
        shrunk = counts * min(1.0, _LARGEST_COUNT / counts.max())
        found[kind] = np.where(counts > 0, np.maximum(1, shrunk.astype(np.int64)), 0)
    return found


def _side(rows: Rows, classes: Whole, tables: dict[int, Whole]) -> bytes:
    scales = rows.scales.to(torch.bfloat16).view(torch.int16).numpy().astype("<i2").view(np.uint8)
    parts = [
        np.array(rows.counts, dtype="<u2").tobytes(),
        classes.astype(np.uint8).tobytes(),
        scales.reshape(-1, 2).T.tobytes(),
    ]
    for table in tables.values():
        parts += [len(table).to_bytes(2, "little"), table.astype("<u2").tobytes()]
    return b"".join(parts)


def _read_side(reader: ByteReader, rows: int) -> tuple[torch.Tensor, Whole, dict[int, Whole]]:
    classes = np.frombuffer(reader.take(rows), dtype=np.uint8).astype(np.int64)
    planes = np.frombuffer(reader.take(2 * rows), dtype=np.uint8).reshape(2, rows)
    scales = torch.from_numpy(np.ascontiguousarray(planes.T).view("<i2")[:, 0].astype(np.int16)).view(torch.bfloat16)
    tables = {}
    for kind in np.unique(classes).tolist():
        size = reader.number(2)
        tables[kind] = np.frombuffer(reader.take(2 * size), dtype="<u2").astype(np.int64)
    reader.finish()
    return scales.float(), classes, tables


def _digits(numbers: Whole, size: int) -> Iterator[tuple[Whole, object]]:
    """Yield numbers below a size in one part, or in several where it is large, with their models."""
    while size > 1 << _LONG:
        yield numbers & ((1 << _DIGIT) - 1), _even_model(1 << _DIGIT)
        numbers, size = numbers >> _DIGIT, ((size - 1) >> _DIGIT) + 1
    yield numbers, _even_model(size)


def _read_digits(coder: Any, count: int, size: int) -> Whole:
    found, shift = np.zeros(count, dtype=np.int64), 0
    while size > 1 << _LONG:
        found += coder.decode(_even_model(1 << _DIGIT), count).astype(np.int64) << shift
        shift, size = shift + _DIGIT, ((size - 1) >> _DIGIT) + 1
    return np.asarray(found + (coder.decode(_even_model(size), count).astype(np.int64) << shift))


def _blocks(width: int) -> int:
    return -(-width // e8.DIMENSION)


def _sides(head: Head, counts: list[int]) -> Iterator[tuple[int, bool, int]]:
    """Yield for each row the number of its module, whether it is a column of B, and its number of blocks."""
    for module, ((_, _, *widths), count) in enumerate(zip(head.layout, counts, strict=True)):
        for is_output, width in enumerate(widths):
            yield from [(module, bool(is_output), _blocks(width))] * count


@cache
def _even_model(count: int) -> object:
    return constriction.stream.model.Uniform(count)


def _table_model(table: tuple[int, ...]) -> object:
    chances = np.array(table, dtype=np.float64)
    return constriction.stream.model.Categorical(chances / chances.sum(), perfect=False, lazy=False)
