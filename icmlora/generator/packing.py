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
    for group in groups:
        writer.write(group.residuals, quantizer.norm_scales(group.slots))
    for group in groups:
        norms = quantizer.norms(group.slots, group.gain, group.residuals)
        scales = _scales(quantizer, group.slots, norms, step)
        writer.write(np.concatenate([group.inputs.ravel(), group.outputs.ravel()]), scales)
    return writer.to_bytes()


def unpack(quantizer: Quantizer, head: CodeHead, words: bytes) -> list[KindIntegers]:
    """Read back what `pack` wrote.

    Raises:
        CodeError: Words that `pack` does not write under this head.
    """
    reader = entropy.Reader(words)
    kinds = [_slots(kind, row) for kind, row in enumerate(head.kept) if (row != ABSENT).any()]
    residuals = [reader.read(quantizer.norm_scales(slots)) for slots in kinds]
    groups = []
    for slots, residual in zip(kinds, residuals, strict=True):
        gain = int(head.gains[slots.kind])
        norms = quantizer.norms(slots, gain, residual)
        if (np.abs(norms) > EXTREME).any():
            raise CodeError("the code's norms are out of range")
        values = reader.read(_scales(quantizer, slots, norms, head.step))
        count, (inputs, outputs) = len(slots.layer), quantizer.sizes(slots.kind)
        left, right = np.split(values, [count * inputs])
        groups.append(KindIntegers(slots, gain, residual, left.reshape(count, inputs), right.reshape(count, outputs)))
    return groups


def _scales(quantizer: Quantizer, slots: Slots, norms: Norms, step: int) -> Scales:
    """Scale index of every integer of one kind: all inputs, then all outputs."""
    return np.concatenate([scale.ravel() for scale in quantizer.scales(slots, norms, step)])


def _slots(kind: int, kept: NDArray[np.uint8]) -> Slots:
    counts = np.where(kept == ABSENT, 0, kept).astype(np.int64)
    layer = np.repeat(np.arange(len(counts)), counts)
    slot = np.concatenate([np.arange(count) for count in counts])
    return Slots(kind, layer, slot)
