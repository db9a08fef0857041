"""Integers of one adapter <-> range-coded words, in the order that encoder and decoder share.

    norm residuals of all kinds | inputs, outputs, along of kind 0 | ... of kind 1 | ...

The norms come first because the scales that the vectors are coded under follow from them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from icmlora.errors import CodeError
from icmlora.generator.code import CodeHead
from icmlora.generator.container import ABSENT
from icmlora.generator.entropy_coding import IntegerReader, Integers, IntegerWriter
from icmlora.generator.initial_a.subspace import InitialSubspace
from icmlora.generator.quantizer import Sides, SideScales, Slots, TokenQuantizer
from icmlora.generator.scales import EXTREME

_Number = TypeVar("_Number", bound=np.generic)


@dataclass(frozen=True, eq=False)
class KindIntegers:
    """Everything that a code stores about the tokens of one module kind; n rank slots, R rows of the initial A."""

    slots: Slots
    gain: int  # how far the task's mean log2 norm is above the generator's table, in eighths
    residuals: Integers  # shape (n,): log2 norms relative to table and gain, in eighths
    inputs: Integers  # shape (n, in)
    outputs: Integers  # shape (n, out)
    along: Integers  # shape (n, R): the part of the inputs in the initial subspace
    scales: SideScales  # scale indices that the vectors' integers are coded under

    @property
    def sides(self) -> Sides:
        """The integers of the vectors, (n, in), (n, out) and (n, R)."""
        return self.inputs, self.outputs, self.along

    def __getitem__(self, chosen: NDArray[np.bool_]) -> KindIntegers:
        """Choose slots with a mask of shape (n,)."""
        inputs, outputs, along = (side[chosen] for side in self.sides)
        left, right, under = (scales[chosen] for scales in self.scales)
        residuals = self.residuals[chosen]
        return KindIntegers(self.slots[chosen], self.gain, residuals, inputs, outputs, along, (left, right, under))


def pack(quantizer: TokenQuantizer, groups: Sequence[KindIntegers]) -> bytes:
    """Write the integers of an adapter, (n, size) of each side; at most one group per kind, ordered by kind."""
    writer = IntegerWriter()
    write_groups(writer, quantizer, groups)
    return writer.to_bytes()


def unpack(
    quantizer: TokenQuantizer, head: CodeHead, subspace: InitialSubspace, words: bytes
) -> Iterator[KindIntegers]:
    """Read what `pack` wrote, one kind after the other; shapes are those of `KindIntegers`."""
    slots = slots_between(np.zeros_like(head.kept), head.kept)
    return read_groups(IntegerReader(words), quantizer, slots, head.gains, subspace, head.step)


def write_groups(writer: IntegerWriter, quantizer: TokenQuantizer, groups: Sequence[KindIntegers]) -> None:
    """Append the integers of some slots, (n, size) of each side; at most one group per kind, ordered by kind."""
    for group in groups:
        writer.write(group.residuals, quantizer.norm_scales(group.slots))
    for group in groups:
        writer.write(_flat(group.sides), _flat(group.scales))


def read_groups(
    reader: IntegerReader,
    quantizer: TokenQuantizer,
    kinds: Sequence[Slots],
    gains: NDArray[np.int16],
    subspace: InitialSubspace,
    step: int,
) -> Iterator[KindIntegers]:
    """Read what `write_groups` wrote, one kind after the other; gains (K,) and step are log2 in eighths.

    Raises:
        CodeError: Norms are out of range, or no encoder wrote these integers.
    """
    residuals = [reader.read(quantizer.norm_scales(slots)) for slots in kinds]
    for slots, residual in zip(kinds, residuals, strict=True):
        gain = int(gains[slots.kind])
        norms = quantizer.norms(slots, gain, residual)
        if (np.abs(norms) > EXTREME).any():
            raise CodeError("the code's norms are out of range")
        scales = quantizer.scales(slots, norms, subspace, step)
        values = reader.read(_flat(scales))
        inputs, outputs, along = split_sides(values, len(slots.layer), [side.shape[1] for side in scales])
        yield KindIntegers(slots, gain, residual, inputs, outputs, along, scales)


def split_sides(values: Integers, count: int, sizes: Sequence[int]) -> list[Integers]:
    """Split the integers of `count` slots into sides of shapes (count, size), which follow each other."""
    ends = np.cumsum([count * size for size in sizes])[:-1]
    return [side.reshape(count, size) for side, size in zip(np.split(values, ends), sizes, strict=True)]


def slots_between(first: NDArray[np.uint16], kept: NDArray[np.uint16]) -> list[Slots]:
    """Return, for each kind that occurs, the slots with first <= slot < kept; both arguments have shape (K, L)."""
    return [_slots(kind, first[kind], row) for kind, row in enumerate(kept) if (row != ABSENT).any()]


def written_slots(slots: Slots, is_worth: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return a mask (n,) of the slots to write: in each layer all up to the last one that is worth its bits."""
    # Slots in between are written too, so that one number per layer says which slots a code holds.
    count = np.zeros(int(slots.layer.max(initial=-1)) + 1, dtype=np.int64)  # (layers,)
    np.maximum.at(count, slots.layer[is_worth], slots.slot[is_worth] + 1)
    return slots.slot < count[slots.layer]


def _flat(sides: Sequence[NDArray[_Number]]) -> NDArray[_Number]:
    """Concatenate sides into one row."""
    return np.concatenate([side.ravel() for side in sides])


def _slots(kind: int, first: NDArray[np.uint16], kept: NDArray[np.uint16]) -> Slots:
    begins = np.where(kept == ABSENT, 0, first).astype(np.int64)  # (L,)
    ends = np.where(kept == ABSENT, 0, kept).astype(np.int64)
    layer = np.repeat(np.arange(len(ends)), ends - begins)
    slot = np.concatenate([np.arange(begin, end) for begin, end in zip(begins, ends, strict=True)])
    return Slots(kind, layer, slot)
