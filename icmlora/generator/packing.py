"""All integers of one adapter <-> range-coded words, in the order that encoder and decoder share.

First the norm residuals of all kinds, which tell the scales of the rest; then the vectors of every slot, kind by kind.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from icmlora.errors import CodeError
from icmlora.generator import entropy
from icmlora.generator.code import ABSENT, CodeHead
from icmlora.generator.entropy import Integers
from icmlora.generator.quantizer import Quantizer, Sides, SideScales, Slots
from icmlora.generator.scales import EXTREME
from icmlora.generator.span import Span

_Number = TypeVar("_Number", bound=np.generic)


@dataclass(frozen=True, eq=False)
class KindIntegers:
    """Everything that is stored of the tokens of one kind."""

    slots: Slots
    gain: int
    """The task's mean log2 norm above the table, in eighths."""
    residuals: Integers
    """Shape (n,): log2 norms above that, in eighths."""
    inputs: Integers
    """Shape (n, in)."""
    outputs: Integers
    """Shape (n, out)."""
    along: Integers
    """Shape (n, R): of the inputs, what lies along the span of the initial A."""
    scales: SideScales
    """What the vectors' integers are coded under."""

    @property
    def sides(self) -> Sides:
        """The integers of the vectors."""
        return self.inputs, self.outputs, self.along

    def __getitem__(self, chosen: NDArray[np.bool_]) -> KindIntegers:
        """Choose slots with a mask of shape (n,)."""
        inputs, outputs, along = (side[chosen] for side in self.sides)
        left, right, under = (scales[chosen] for scales in self.scales)
        residuals = self.residuals[chosen]
        return KindIntegers(self.slots[chosen], self.gain, residuals, inputs, outputs, along, (left, right, under))


def written_slots(slots: Slots, alive: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Leave out, in each layer, the slots after the last one that is worth its bits (`alive`, shape (n,)).

    The slots before are kept, so that a number per layer says which.
    """
    count = np.zeros(int(slots.layer.max(initial=-1)) + 1, dtype=np.int64)
    np.maximum.at(count, slots.layer[alive], slots.slot[alive] + 1)
    return slots.slot < count[slots.layer]


def pack(quantizer: Quantizer, groups: Sequence[KindIntegers]) -> bytes:
    """Write the integers of an adapter; at most one group per kind, ordered by kind."""
    writer = entropy.Writer()
    write_groups(writer, quantizer, groups)
    return writer.to_bytes()


def write_groups(writer: entropy.Writer, quantizer: Quantizer, groups: Sequence[KindIntegers]) -> None:
    """Append the integers of some slots; at most one group per kind, ordered by kind."""
    for group in groups:
        writer.write(group.residuals, quantizer.norm_scales(group.slots))
    for group in groups:
        writer.write(_flat(group.sides), _flat(group.scales))


def unpack(quantizer: Quantizer, head: CodeHead, span: Span, words: bytes) -> list[KindIntegers]:
    """Read back what `pack` wrote.

    Raises:
        CodeError: Words that `pack` does not write under this head.
    """
    none = np.zeros_like(head.kept)
    slots = slots_between(none, head.kept)
    return read_groups(entropy.Reader(words), quantizer, slots, head.gains, span, head.step)


def read_groups(
    reader: entropy.Reader,
    quantizer: Quantizer,
    kinds: Sequence[Slots],
    gains: NDArray[np.int16],
    span: Span,
    step: int,
) -> list[KindIntegers]:
    """Read back what `write_groups` wrote of some slots.

    Raises:
        CodeError: Words that it does not write.
    """
    residuals = [reader.read(quantizer.norm_scales(slots)) for slots in kinds]
    groups = []
    for slots, residual in zip(kinds, residuals, strict=True):
        gain = int(gains[slots.kind])
        norms = quantizer.norms(slots, gain, residual)
        if (np.abs(norms) > EXTREME).any():
            raise CodeError("the code's norms are out of range")
        scales = quantizer.scales(slots, norms, span, step)
        values = reader.read(_flat(scales))
        inputs, outputs, along = split_sides(values, len(slots.layer), [side.shape[1] for side in scales])
        groups.append(KindIntegers(slots, gain, residual, inputs, outputs, along, scales))
    return groups


def split_sides(values: Integers, count: int, sizes: Sequence[int]) -> list[Integers]:
    """Take apart the integers of `count` slots, one side after the other; shapes (count, size)."""
    ends = np.cumsum([count * size for size in sizes])[:-1]
    return [side.reshape(count, size) for side, size in zip(np.split(values, ends), sizes, strict=True)]


def slots_between(first: NDArray[np.uint8], kept: NDArray[np.uint8]) -> list[Slots]:
    """Return, for each kind that occurs, the slots from `first` on that are kept; both of shape (K, L)."""
    return [_slots(kind, first[kind], row) for kind, row in enumerate(kept) if (row != ABSENT).any()]


def _flat(sides: Sequence[NDArray[_Number]]) -> NDArray[_Number]:
    """Put sides one after the other, shape (all of them,)."""
    return np.concatenate([side.ravel() for side in sides])


def _slots(kind: int, first: NDArray[np.uint8], kept: NDArray[np.uint8]) -> Slots:
    begins = np.where(kept == ABSENT, 0, first).astype(np.int64)
    ends = np.where(kept == ABSENT, 0, kept).astype(np.int64)
    layer = np.repeat(np.arange(len(ends)), ends - begins)
    slot = np.concatenate([np.arange(begin, end) for begin, end in zip(begins, ends, strict=True)])
    return Slots(kind, layer, slot)
