"""Tokens of one kind <-> integers, under the decoder's prediction.

    integer = round((value - norm * mean direction) / step),
    coded under the scale  norm / sqrt(size) * spread * profile of the channel / step

In modules whose initial A is known, the part of the inputs in the initial subspace takes one integer per row of A. Only
the rest takes one per channel, coded under that scale times 2^shift, with one shift for each kind and rank slot.

Norms, steps, spreads and profiles are whole eighths of an octave here, so a scale index is a sum of integers: encoder
and decoder agree on it exactly, on every machine. Only the mean direction is a float, and it is added after decoding,
where a rounding difference stays a rounding difference. Both vectors of a token carry its singular value, so they are
first scaled to the rounded one: rounding a norm does not change dW.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from icmlora.generator import entropy_coding as entropy
from icmlora.generator.cvae import CVAE, TaskState
from icmlora.generator.entropy_coding import Integers, Scales
from icmlora.generator.initial_a.subspace import InitialSubspace
from icmlora.generator.scales import EXTREME, LARGEST, OCTAVE, SMALLEST, STRENGTHS, centre_table
from icmlora.generator.stack import INPUTS, OUTPUTS, places_of
from icmlora.generator.tokens import KindTokens

Means = tuple[torch.Tensor, torch.Tensor]  # the generator's predictions, shapes (n, in) and (n, out)
Norms = NDArray[np.int64]  # log2 norms, in eighths
Sides = tuple[Integers, Integers, Integers]  # integers of the tokens of one kind: shapes (n, in), (n, out) and (n, R)
SideScales = tuple[Scales, Scales, Scales]  # scale indices of the integers, of the same shapes


@dataclass(frozen=True, eq=False)
class Slots:
    """n rank slots of one kind, ordered by (layer, slot)."""

    kind: int
    layer: NDArray[np.int64]  # shape (n,)
    slot: NDArray[np.int64]  # shape (n,)

    def __getitem__(self, chosen: NDArray[np.bool_]) -> Slots:
        return Slots(self.kind, self.layer[chosen], self.slot[chosen])


class TokenQuantizer:
    """The integer side of one network: its tables, rounded once, and the rounding of tokens under its predictions."""

    def __init__(self, net: CVAE) -> None:
        self._net = net
        self._norms = _eighths(net.norm_mean)  # (K, L, S)
        # Norm residuals are counted in eighths, hence the factor of OCTAVE = 2^3.
        self._norm_scales = np.clip(_eighths(net.norm_spread) + 3 * OCTAVE, SMALLEST, LARGEST)  # (K, S)
        self._spreads = _eighths(net.spread)  # (K, 2, L, S)
        self.sizes = [(kind.inputs, kind.outputs) for kind in net.config.kinds]  # widths of each kind's modules
        sides = [(kind, side) for kind in range(len(self.sizes)) for side in (INPUTS, OUTPUTS)]
        self._profiles = [_eighths(net.sensitivity.profile(*pair)).astype(np.int16) for pair in sides]  # (L, size) each

    def norm_scales(self, slots: Slots) -> Integers:
        """Return the scale indices of the norm residuals, shape (n,)."""
        scales: Integers = self._norm_scales[slots.kind, slots.slot].astype(np.int32)
        return scales

    def norm_residuals(self, slots: Slots, norm: torch.Tensor, gain: int | None = None) -> tuple[int, Integers]:
        """Split norms (n,) into the task's gain and residuals (n,), in eighths; by default the gain is their mean."""
        offset = _eighths(norm.log2()) - self._norms[slots.kind, slots.layer, slots.slot]
        if gain is None:
            gain = round(float(offset.mean())) if len(offset) else 0
        return gain, (offset - gain).astype(np.int32)

    def norms(self, slots: Slots, gain: int, residuals: Integers) -> Norms:
        """Return log2 norms from gain and residuals, shape (n,)."""
        norms: Norms = self._norms[slots.kind, slots.layer, slots.slot] + gain + residuals
        return norms

    def scales(self, slots: Slots, norms: Norms, subspace: InitialSubspace, step: int) -> SideScales:
        """Return the scale indices of the integers of each slot, shapes (n, in), (n, out) and (n, R)."""
        spread = self._spreads[slots.kind, :, slots.layer, slots.slot]  # (n, 2): numpy moves the indexed axes first
        wide = [_half_octaves(size) for size in self.sizes[slots.kind]]  # log2 sqrt(size) of both sides
        level = norms[:, None] - step - np.array(wide) + spread  # (n, 2)
        known = subspace.knows(slots.kind)[slots.layer]
        level[known, INPUTS] += subspace.shifts[slots.kind, slots.slot[known]]
        # Profiles are within EXTREME, so a level further out is clipped to the same index from there.
        level = np.clip(level, SMALLEST - EXTREME, LARGEST + EXTREME).astype(np.int16)
        inputs, outputs = (
            _indices(self._profiles[2 * slots.kind + side], slots.layer, level[:, side]) for side in (INPUTS, OUTPUTS)
        )
        return inputs, outputs, _subspace_scales(slots, norms - step, subspace)

    def quantise(
        self, group: KindTokens, norms: Norms, state: TaskState, step: int, means: Means | None = None
    ) -> Sides:
        """Round tokens to integers, (n, in), (n, out) and (n, R); `means` are predictions that are known already."""
        inputs, outputs, along = self.in_steps(group, norms, state, step, means)
        return _whole(inputs), _whole(outputs), _whole(along)

    def in_steps(
        self, group: KindTokens, norms: Norms, state: TaskState, step: int, means: Means | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Measure tokens in quantiser steps from their prediction: float64, shapes (n, in), (n, out) and (n, R)."""
        slots = Slots(group.kind, group.layer.numpy(), group.slot.numpy())
        means = means or self.means(slots, norms, state)
        # The two vectors of a pair may change sign together: the sign nearer to the prediction takes fewer bits.
        agreement = (group.inputs * means[INPUTS]).sum(1) + (group.outputs * means[OUTPUTS]).sum(1)
        factor = torch.where(agreement < 0, -1.0, 1.0) * (norm_of(norms) / group.norm).sqrt()
        inputs, outputs = (
            ((values * factor[:, None] - mean) / 2.0 ** (step / OCTAVE)).double()
            for values, mean in zip((group.inputs, group.outputs), means, strict=True)
        )
        along = state.subspace.project(group.kind, group.layer, inputs)
        return inputs - state.subspace.expand(group.kind, group.layer, along, inputs.shape[1]), outputs, along

    def shifts(self, tokens: Iterable[KindTokens], state: TaskState) -> NDArray[np.int8]:
        """Measure the shifts of an adapter, (K, S): how much of its inputs is outside the initial subspace."""
        config = self._net.config
        shifts = np.zeros((len(config.kinds), config.slots), dtype=np.int8)
        for group in (group for group in tokens if state.subspace.knows(group.kind).any()):
            slots = Slots(group.kind, group.layer.numpy(), group.slot.numpy())
            norms = _eighths(group.norm.log2())
            rest = self.in_steps(group, norms, state, 0)[INPUTS].square().sum(1).numpy()  # (n,)
            level = norms + self._spreads[group.kind, INPUTS, slots.layer, slots.slot]
            profiles = np.exp2(2 / OCTAVE * self._profiles[2 * group.kind + INPUTS]).mean(axis=1)  # (L,)
            share = rest / (np.exp2(2 / OCTAVE * level) * profiles[slots.layer])
            known = state.subspace.knows(group.kind)[slots.layer]
            for slot in np.unique(slots.slot[known]).tolist():
                left = float(share[known & (slots.slot == slot)].mean())
                shifts[group.kind, slot] = np.clip(round(OCTAVE / 2 * math.log2(max(left, 2.0**-30))), -127, 127)
        return shifts

    def dequantise(
        self,
        slots: Slots,
        norms: Norms,
        state: TaskState,
        step: int,
        integers: Sides,
        scales: SideScales,
        means: Means | None = None,
    ) -> KindTokens:
        """Turn integers (n, size) into tokens of these shapes; each becomes the mean of its bin under its scale."""
        inputs, outputs, along = (
            torch.from_numpy(centred(whole, scale)).mul_(2.0 ** (step / OCTAVE))
            for whole, scale in zip(integers, scales, strict=True)
        )
        means = means or self.means(slots, norms, state)
        layer, slot = torch.from_numpy(slots.layer), torch.from_numpy(slots.slot)
        inputs.mul_(boost_of(slots, state.subspace))
        inputs.add_(means[INPUTS]).add_(state.subspace.expand(slots.kind, layer, along, inputs.shape[1]))
        return KindTokens(slots.kind, layer, slot, norm_of(norms), inputs, outputs.add_(means[OUTPUTS]))

    def means(self, slots: Slots, norms: Norms, state: TaskState) -> Means:
        """Return the generator's predictions, shapes (n, in) and (n, out)."""
        layer, slot = torch.from_numpy(slots.layer), torch.from_numpy(slots.slot)
        (prediction,) = self._net.decode(places_of(slots.kind, layer, slot), state.features)
        norm = norm_of(norms)[:, None]
        return prediction.inputs.mul_(norm), prediction.outputs.mul_(norm)


def centred(whole: Integers, scale: Scales) -> NDArray[np.float32]:
    """Return the mean of each integer's bin, in quantiser steps, (n, size); most integers are zero and stay so."""
    table, starts = centre_table()
    values = whole.astype(np.float32)
    # Only nonzero integers are looked up, by flat index.
    places = np.flatnonzero(whole != 0)  # of booleans: several times as fast as of integers
    found = values.ravel().take(places)
    indices = scale.ravel().take(places).astype(np.int64) - SMALLEST
    entries = starts.take(indices) + np.abs(whole.ravel().take(places))
    beyond = np.flatnonzero(entries >= starts.take(indices + 1))
    entries[beyond] = 0
    centre = np.copysign(table.take(entries), found)
    centre[beyond] = found[beyond]  # the middle of the bin
    values.ravel()[places] = centre
    return values


def boost_of(slots: Slots, subspace: InitialSubspace) -> torch.Tensor:
    """Return the factor of each slot's decoded inputs across the subspace, shape (n, 1)."""
    known = subspace.knows(slots.kind)[slots.layer]
    boosts = np.where(known, subspace.boosts[slots.kind, slots.slot], 0)
    return torch.from_numpy(np.exp2(boosts / STRENGTHS).astype(np.float32))[:, None]


def _subspace_scales(slots: Slots, level: Norms, subspace: InitialSubspace) -> Scales:
    """Return the scale indices of integers along the subspace, (n, R): a slot's norm is spread evenly over them."""
    rows = np.arange(subspace.rows(slots.kind))
    ranks = subspace.ranks_of(slots.kind)  # (L,)
    wide = np.array([_half_octaves(max(rank, 1)) for rank in ranks.tolist()], dtype=np.int64)
    indices = np.where(rows < ranks[slots.layer, None], (level - wide[slots.layer])[:, None], SMALLEST)
    return np.clip(indices, SMALLEST, LARGEST).astype(np.int8)


def _half_octaves(size: int) -> int:
    """Return log2 of the square root of a size, in eighths."""
    return round(OCTAVE * math.log2(size) / 2)


def _whole(values: torch.Tensor) -> Integers:
    return entropy.clip(np.rint(values.numpy()))


def _indices(profiles: NDArray[np.int16], layer: NDArray[np.int64], level: NDArray[np.int16]) -> Scales:
    """Add the profile (L, size) of each slot's layer (n,) to its level (n,); returns scale indices (n, size)."""
    indices = profiles[layer]
    indices += level[:, None]
    return np.clip(indices, SMALLEST, LARGEST, out=indices).astype(np.int8)


def norm_of(norms: Norms) -> torch.Tensor:
    """Return norms as floats, shape (n,)."""
    return torch.from_numpy(np.exp2(norms / OCTAVE).astype(np.float32))


def _eighths(log2: torch.Tensor) -> NDArray[np.int64]:
    """Round to whole eighths."""
    return np.clip(np.rint(log2.detach().numpy() * float(OCTAVE)), -EXTREME, EXTREME).astype(np.int64)
