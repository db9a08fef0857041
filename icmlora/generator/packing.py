"""All integers of one adapter <-> range-coded words, in the order that encoder and decoder share.

First the norm residuals of all kinds, which tell the scales of the rest; then both vectors of every slot, kind by kind.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from icmlora.errors import CodeError
from icmlora.generator import entropy
from icmlora.generator.code import ABSENT, CodeHead
from icmlora.generator.entropy import Integers, Scales
from icmlora.generator.quantizer import Norms, Quantizer, Slots
from icmlora.generator.scales import EXTREME


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

    def __getitem__(self, chosen: NDArray[np.bool_]) -> KindIntegers:
        """Choose slots with a mask of shape (n,)."""
        residuals, inputs, outputs = self.residuals[chosen], self.inputs[chosen], self.outputs[chosen]
        return KindIntegers(self.slots[chosen], self.gain, residuals, inputs, outputs)


def written_slots(slots: Slots, alive: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Leave out, in each layer, the slots after the last one that is worth its bits (`alive`, shape (n,)).

    The slots before are kept, so that a number per layer says which.
    """
    count = np.zeros(int(slots.layer.max(initial=-1)) + 1, dtype=np.int64)
    np.maximum.at(count, slots.layer[alive], slots.slot[alive] + 1)
    return slots.slot < count[slots.layer]


def pack(quantizer: Quantizer, groups: Sequence[KindIntegers], step: int) -> bytes:
    """Write the integers of an adapter; at most one group per kind, ordered by kind."""
    writer = entropy.Writer()
    write_groups(writer, quantizer, groups, step)
    return writer.to_bytes()


def write_groups(writer: entropy.Writer, quantizer: Quantizer, groups: Sequence[KindIntegers], step: int) -> None:
    """Append the integers of some slots; at most one group per kind, ordered by kind."""
    for group in groups:
        writer.write(group.residuals, quantizer.norm_scales(group.slots))
    for group in groups:
        norms = quantizer.norms(group.slots, group.gain, group.residuals)
        scales = _scales(quantizer, group.slots, norms, step)
        writer.write(np.concatenate([group.inputs.ravel(), group.outputs.ravel()]), scales)


def unpack(quantizer: Quantizer, head: CodeHead, words: bytes) -> list[KindIntegers]:
    """Read back what `pack` wrote.

    Raises:
        CodeError: Words that `pack` does not write under this head.
    """
    none = np.zeros_like(head.kept)
    return read_groups(entropy.Reader(words), quantizer, slots_between(none, head.kept), head.gains, head.step)


def read_groups(
    reader: entropy.Reader, quantizer: Quantizer, kinds: Sequence[Slots], gains: NDArray[np.int16], step: int
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
        values = reader.read(_scales(quantizer, slots, norms, step))
        left, right = split_sides(values, len(slots.layer), quantizer.sizes(slots.kind))
        groups.append(KindIntegers(slots, gain, residual, left, right))
    return groups


def split_sides(values: Integers, count: int, sizes: tuple[int, int]) -> tuple[Integers, Integers]:
    """Take apart the integers of `count` slots: all inputs, shape (count, in), then all outputs, (count, out)."""
    left, right = np.split(values, [count * sizes[0]])
    return left.reshape(count, sizes[0]), right.reshape(count, sizes[1])


def slots_between(first: NDArray[np.uint8], kept: NDArray[np.uint8]) -> list[Slots]:
    """Return, for each kind that occurs, the slots from `first` on that are kept; both of shape (K, L)."""
    return [_slots(kind, first[kind], row) for kind, row in enumerate(kept) if (row != ABSENT).any()]


def _scales(quantizer: Quantizer, slots: Slots, norms: Norms, step: int) -> Scales:
    """Scale index of every integer of one kind: all inputs, then all outputs."""
    return np.concatenate([scale.ravel() for scale in quantizer.scales(slots, norms, step)])


def _slots(kind: int, first: NDArray[np.uint8], kept: NDArray[np.uint8]) -> Slots:
    begins = np.where(kept == ABSENT, 0, first).astype(np.int64)
    ends = np.where(kept == ABSENT, 0, kept).astype(np.int64)
    layer = np.repeat(np.arange(len(ends)), ends - begins)
    slot = np.concatenate([np.arange(begin, end) for begin, end in zip(begins, ends, strict=True)])
    return Slots(kind, layer, slot)
