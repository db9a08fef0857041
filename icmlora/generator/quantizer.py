"""Tokens of one kind <-> integers, under the decoder's prediction.

    integer = round((value - norm * mean direction) / step),   coded under the scale  norm / sqrt(size) * spread / step

Norms, steps and spreads are whole eighths of an octave here, so a scale index is a sum of integers: encoder and
decoder agree on it exactly, whatever machine they run on. Only the mean direction is float, and it is added after
decoding, where a rounding difference stays a rounding difference.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from icmlora.generator import entropy
from icmlora.generator.cvae import CVAE, INPUTS, OUTPUTS, TaskState
from icmlora.generator.entropy import Integers
from icmlora.generator.scales import LARGEST, OCTAVE, ROUNDING, SMALLEST, centres
from icmlora.generator.tokens import KindTokens

@dataclass(frozen=True, eq=False)
class Slots:
    """Rank slots of one kind, ordered by (layer, slot)."""

    kind: int
    layer: NDArray[np.int64]
    """Shape (n,)."""
    slot: NDArray[np.int64]
    """Shape (n,)."""

    def __getitem__(self, chosen: NDArray[np.bool_]) -> Slots:
        return Slots(self.kind, self.layer[chosen], self.slot[chosen])


class Quantizer:
    """The integer side of one network: its tables rounded once, and rounding under its predictions."""

    def __init__(self, net: CVAE) -> None:
        self._net = net
        self._norms = _eighths(net.norm_mean)  # (K, L, S)
        # Norm residuals are counted in eighths, hence the factor of OCTAVE = 2^3.
        self._norm_scales = np.clip(_eighths(net.norm_spread) + 3 * OCTAVE, SMALLEST, LARGEST)  # (K, S)
        self._spreads = _eighths(net.spread)  # (K, 2, L, S)
        self._sizes = [(kind.inputs, kind.outputs) for kind in net.config.kinds]

    def norm_scales(self, slots: Slots) -> Integers:
        """Return the scale indices of the norm residuals, shape (n,)."""
        return self._norm_scales[slots.kind, slots.slot].astype(np.int32)

    def norm_residuals(self, slots: Slots, norm: torch.Tensor) -> tuple[int, Integers]:
        """Split float norms (n,) into the task's gain and integer residuals (n,), both in eighths."""
        offset = _eighths(norm.log2()) - self._norms[slots.kind, slots.layer, slots.slot]
        gain = round(float(offset.mean())) if len(offset) else 0
        return gain, entropy.clip((offset - gain).astype(np.int32), self.norm_scales(slots))

    def norms(self, slots: Slots, gain: int, residuals: Integers) -> NDArray[np.int64]:
        """Put log2 norms together again, in eighths, shape (n,)."""
        return self._norms[slots.kind, slots.layer, slots.slot] + gain + residuals

    def scales(self, slots: Slots, norms: NDArray[np.int64], step: int) -> tuple[Integers, Integers]:
        """Return the scale indices of the integers of each slot, (n,) for inputs and (n,) for outputs."""
        spread = self._spreads[slots.kind, :, slots.layer, slots.slot]  # (n, 2): numpy moves the indexed axes first
        wide = [round(OCTAVE * math.log2(size) / 2) for size in self._sizes[slots.kind]]
        index = np.clip(norms[:, None] - step - np.array(wide) + spread, SMALLEST, LARGEST).astype(np.int32)
        return index[:, INPUTS], index[:, OUTPUTS]

    def quantise(
        self, group: KindTokens, norms: NDArray[np.int64], state: TaskState, step: int
    ) -> tuple[Integers, Integers]:
        """Round tokens to integers of shapes (n, in) and (n, out)."""
        slots = Slots(group.kind, group.layer.numpy(), group.slot.numpy())
        means = self._means(slots, norms, state)
        sign = torch.sign((group.inputs * means[INPUTS]).sum(1) + (group.outputs * means[OUTPUTS]).sum(1))
        sign = torch.where(sign < 0, -1.0, 1.0)[:, None]
        rounded = []
        for values, mean, scale in zip(
            (group.inputs, group.outputs), means, self.scales(slots, norms, step), strict=True
        ):
            exact = ((values * sign - mean) / 2.0 ** (step / OCTAVE)).numpy()
            integers = np.sign(exact) * np.floor(np.abs(exact) + ROUNDING)
            rounded.append(entropy.clip(integers.astype(np.int32), np.broadcast_to(scale[:, None], exact.shape)))
        return rounded[INPUTS], rounded[OUTPUTS]

    def dequantise(
        self, slots: Slots, norms: NDArray[np.int64], state: TaskState, step: int, integers: tuple[Integers, Integers]
    ) -> KindTokens:
        """Turn integers back into tokens; each lands on the mean of its bin under the predicted scale."""
        means = self._means(slots, norms, state)
        values = []
        for whole, mean, scale in zip(integers, means, self.scales(slots, norms, step), strict=True):
            centre = np.sign(whole) * _centres(scale, np.abs(whole))
            values.append(mean + torch.from_numpy(centre.astype(np.float32)) * 2.0 ** (step / OCTAVE))
        layer, slot = torch.from_numpy(slots.layer), torch.from_numpy(slots.slot)
        return KindTokens(slots.kind, layer, slot, _norm(norms), values[INPUTS], values[OUTPUTS])

    def _means(
        self, slots: Slots, norms: NDArray[np.int64], state: TaskState
    ) -> tuple[torch.Tensor, torch.Tensor]:
        layer, slot = torch.from_numpy(slots.layer), torch.from_numpy(slots.slot)
        prediction = self._net.decode(slots.kind, layer, slot, state)
        norm = _norm(norms)[:, None]
        return norm * prediction.inputs, norm * prediction.outputs


def _centres(scale: Integers, magnitude: Integers) -> NDArray[np.float64]:
    centre = np.empty(magnitude.shape)
    for index in np.unique(scale):
        rows = scale == index
        centre[rows] = centres(int(index))[magnitude[rows]]
    return centre


def _norm(norms: NDArray[np.int64]) -> torch.Tensor:
    return torch.from_numpy(np.exp2(norms / OCTAVE).astype(np.float32))


def _eighths(log2: torch.Tensor) -> NDArray[np.int64]:
    return np.rint(log2.detach().numpy() * float(OCTAVE)).astype(np.int64)
