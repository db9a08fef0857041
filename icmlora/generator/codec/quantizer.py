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
from collections.abc import Iterable, Sequence
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray

from icmlora.generator.codec.runs import ChannelOrder, Nonzeros, Profiles, Runs
from icmlora.generator.files import entropy_coding as entropy
from icmlora.generator.files.entropy_coding import Integers, Scales
from icmlora.generator.initial_a.subspace import InitialSubspace
from icmlora.generator.network.cvae import CVAE, TaskState
from icmlora.generator.network.stack import INPUTS, OUTPUTS, places_of
from icmlora.generator.network.tokens import KindTokens, Slots
from icmlora.generator.scales import EXTREME, LARGEST, OCTAVE, SMALLEST, STRENGTHS, centre_table

_CPU = torch.device("cpu")
_SHORT = 31  # largest magnitude in the small table of centres

Means = tuple[torch.Tensor, torch.Tensor]  # the generator's predictions, shapes (n, in) and (n, out)
Norms = NDArray[np.int64]  # log2 norms, in eighths


class TokenQuantizer:
    """The integer side of one network: its tables, rounded once, and the rounding of tokens under its predictions."""

    def __init__(self, net: CVAE) -> None:
        self._net = net
        self._norms = _eighths(net.norm_mean)  # (K, L, S)
        # Norm residuals are counted in eighths, hence the factor of OCTAVE = 2^3.
        self._norm_scales = np.clip(_eighths(net.norm_spread) + 3 * OCTAVE, SMALLEST, LARGEST)  # (K, S)
        self._spreads = _eighths(net.spread)  # (K, 2, L, S)
        self.sizes = [(kind.inputs, kind.outputs) for kind in net.config.kinds]
        self._profiles = profiles = [  # (L, in) and (L, out) of each kind
            tuple(_eighths(net.sensitivity.profile(kind, side)).astype(np.int16) for side in (INPUTS, OUTPUTS))
            for kind in range(len(self.sizes))
        ]
        directions = net.directions  # not self, which the caches would keep alive
        self._directions = cache(lambda place, device: directions[place].detach().to(device))
        self._orders = cache(lambda kind: [ChannelOrder(profile) for profile in profiles[kind]])

    def norm_scales(self, slots: Slots) -> Integers:
        """Return the scale indices of the norm residuals, shape (n,)."""
        scales: Integers = self._norm_scales[slots.kind, slots.slot].astype(np.int32)
        return scales

    def gain(self, slots: Slots, norms: Norms) -> int:
        """Return how far the mean log2 norm of a task's slots is above the generator's table, in eighths."""
        offset = norms - self._norms[slots.kind, slots.layer, slots.slot]
        return round(float(offset.mean())) if len(offset) else 0

    def norm_residuals(self, slots: Slots, gain: int, norms: Norms) -> Integers:
        """Return log2 norms relative to table and gain, in eighths, shape (n,)."""
        residuals: Integers = (norms - self._norms[slots.kind, slots.layer, slots.slot] - gain).astype(np.int32)
        return residuals

    def norms(self, slots: Slots, gain: int, residuals: Integers) -> Norms:
        """Return log2 norms from gain and residuals, shape (n,)."""
        norms: Norms = self._norms[slots.kind, slots.layer, slots.slot] + gain + residuals
        return norms

    def scales(self, slots: Slots, norms: Norms, subspace: InitialSubspace, step: int) -> list[Scales]:
        """Return the scale indices of the integers of each slot, shapes (n, in), (n, out) and (n, R)."""
        profiles = (*self._profiles[slots.kind], _profiles_along(subspace, slots.kind))
        levels = self._levels(slots, norms, subspace, step)
        return [
            _clipped(profile[slots.layer] + level.astype(np.int16)[:, None])
            for profile, level in zip(profiles, levels, strict=True)
        ]

    def runs(self, slots: Slots, norms: Norms, subspace: InitialSubspace, step: int) -> Runs:
        """Return the same scale indices as runs, in the row of inputs (n, in), outputs (n, out) and along (n, R)."""
        orders = (*self._orders(slots.kind), ChannelOrder(_profiles_along(subspace, slots.kind)))
        return Runs(orders, slots.layer, self._levels(slots, norms, subspace, step))

    def _levels(self, slots: Slots, norms: Norms, subspace: InitialSubspace, step: int) -> list[Norms]:
        """Return the scale indices of the integers of each slot and side, before profiles, shapes (n,)."""
        spread = self._spreads[slots.kind, :, slots.layer, slots.slot]  # (n, 2): numpy moves the indexed axes first
        wide = [_half_octaves(size) for size in self.sizes[slots.kind]]  # log2 sqrt(size) of both sides
        level = norms[:, None] - step - np.array(wide) + spread  # (n, 2)
        known = subspace.knows(slots.kind)[slots.layer]
        level[known, INPUTS] += subspace.shifts[slots.kind, slots.slot[known]]
        # Along the subspace, a slot's norm is spread evenly over its module's rows.
        rows = [_half_octaves(max(rank, 1)) for rank in subspace.ranks_of(slots.kind).tolist()]
        along = norms - step - np.array(rows, dtype=np.int64)[slots.layer]
        # Profiles are within EXTREME, so clipping a level here does not change its clipped indices.
        return [np.clip(values, SMALLEST - EXTREME, LARGEST + EXTREME) for values in (*level.T, along)]

    def quantise(
        self, group: KindTokens, norms: Norms, state: TaskState, step: int, means: Means | None = None
    ) -> Nonzeros:
        """Round tokens, (n, in) and (n, out), to integers; `means` are predictions if already known."""
        slots = group.slots
        return self.rounded(slots, norms, state.subspace, step, self.in_steps(group, norms, state, step, means))

    def rounded(
        self, slots: Slots, norms: Norms, subspace: InitialSubspace, step: int, vectors: Sequence[torch.Tensor]
    ) -> Nonzeros:
        """Round the vectors of n slots, measured in steps, shapes (n, in), (n, out) and (n, R)."""
        profiles = (*self._profiles[slots.kind], _profiles_along(subspace, slots.kind))
        levels = self._levels(slots, norms, subspace, step)
        parts, origin, count = [], 0, len(norms)
        for side, (values, profile, level) in enumerate(zip(vectors, profiles, levels, strict=True)):
            row, size = values.numpy().ravel(), values.shape[1]
            places = np.flatnonzero(np.abs(row) > 0.5)
            counts = np.diff(np.searchsorted(places, size * np.arange(count + 1)))
            channels = places + np.repeat(size * (slots.layer - np.arange(count)), counts)
            scales = profile.ravel().take(channels) + np.repeat(level.astype(np.int16), counts)
            whose = np.repeat(np.arange(side * count, (side + 1) * count, dtype=np.int32), counts)
            parts.append((places + origin, entropy.clip(np.rint(row.take(places))), _clipped(scales), whose))
            origin += len(row)
        return Nonzeros(*(np.concatenate(column) for column in zip(*parts, strict=True)))

    def in_steps(
        self, group: KindTokens, norms: Norms, state: TaskState, step: int, means: Means | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Measure tokens in quantiser steps from their prediction: float32, shapes (n, in), (n, out) and (n, R)."""
        slots = group.slots
        means = means or self.means(slots, norms, state)
        # The two vectors of a pair may change sign together: the sign nearer to the prediction takes fewer bits.
        agreement = (group.inputs * means[INPUTS]).sum(1) + (group.outputs * means[OUTPUTS]).sum(1)
        factor = torch.where(agreement < 0, -1.0, 1.0) * (norm_of(norms) / group.norm).sqrt()
        a_step = 2.0 ** (-step / OCTAVE)
        factor = (factor * a_step)[:, None]
        inputs, outputs = (
            values.mul(factor).sub_(mean, alpha=a_step)
            for values, mean in zip((group.inputs, group.outputs), means, strict=True)
        )
        along = state.subspace.project(group.kind, group.layer, inputs)
        if state.subspace.rows(group.kind):
            inputs -= state.subspace.expand(group.kind, group.layer, along, inputs.shape[1])
        return inputs, outputs, along

    def shifts(self, tokens: Iterable[KindTokens], state: TaskState) -> NDArray[np.int8]:
        """Measure the shifts of an adapter, (K, S): how much of its inputs is outside the initial subspace."""
        config = self._net.config
        shifts = np.zeros((len(config.kinds), config.slots), dtype=np.int8)
        for group in (group for group in tokens if state.subspace.knows(group.kind).any()):
            slots = group.slots
            norms = log2_norms(group.norm)
            rest = self.in_steps(group, norms, state, 0)[INPUTS].square().sum(1).numpy()  # (n,)
            level = norms + self._spreads[group.kind, INPUTS, slots.layer, slots.slot]
            profiles = np.exp2(2 / OCTAVE * self._profiles[group.kind][INPUTS]).mean(axis=1)  # (L,)
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
        vectors: Nonzeros,
        *,
        means: Means | None = None,
        factors: tuple[torch.Tensor, torch.Tensor] | None = None,
        device: torch.device = _CPU,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Turn the integers of n slots into their inputs (n, in) and outputs (n, out), times a factor of each, (n,).

        Each integer becomes the mean of its bin under its scale. `means` are the predictions, without factors. They and
        the factors are on the CPU; the result is on the device, which does most of the work.
        """
        left, right = factors or (torch.ones(len(norms)),) * 2
        rows = state.subspace.rows(slots.kind)
        count, sizes = len(norms), (*self.sizes[slots.kind], rows)
        row = (torch.zeros if rows else torch.empty)(count * sum(sizes), device=device)
        parts = torch.split(row, [count * size for size in sizes])
        inputs, outputs, along = (part.view(count, size) for part, size in zip(parts, sizes, strict=True))
        if means is None:
            self._predict(slots, norms, state, (inputs, outputs), (left, right))
        else:
            for target, mean, factor in zip((inputs, outputs), means, (left, right), strict=True):
                torch.mul(mean.to(device), factor[:, None].to(device), out=target)
        known = state.subspace.knows(slots.kind)[slots.layer]
        boosts = np.where(known, state.subspace.boosts[slots.kind, slots.slot], 0)  # of inputs across the subspace
        boosted = left * torch.from_numpy(np.exp2(boosts / STRENGTHS).astype(np.float32))
        sides = torch.cat([boosted, right, left]) * 2.0 ** (step / OCTAVE)
        values = torch.from_numpy(centred(vectors.values, vectors.scales))
        values.mul_(sides.index_select(0, torch.from_numpy(vectors.sides)))
        row.index_add_(0, torch.from_numpy(vectors.places).to(device), values.to(device))
        if rows:
            inputs += state.subspace.expand(slots.kind, torch.from_numpy(slots.layer), along, inputs.shape[1])
        return inputs, outputs

    def means(self, slots: Slots, norms: Norms, state: TaskState) -> Means:
        """Return the generator's predictions, shapes (n, in) and (n, out)."""
        inputs, outputs = (torch.empty(len(norms), size) for size in self.sizes[slots.kind])
        self._predict(slots, norms, state, (inputs, outputs), (torch.ones(len(norms)),) * 2)
        return inputs, outputs

    @torch.no_grad()
    def _predict(
        self, slots: Slots, norms: Norms, state: TaskState, means: Means, factors: tuple[torch.Tensor, torch.Tensor]
    ) -> None:
        """Write the generator's predictions, times a factor of each slot."""
        places = places_of(slots.kind, torch.from_numpy(slots.layer), torch.from_numpy(slots.slot))
        hidden = self._net.hidden(places, state.features)
        for side, (rows, mean, factor) in enumerate(zip(hidden, means, factors, strict=True)):
            weighted = rows * (norm_of(norms) * factor)[:, None]
            torch.mm(weighted.to(mean.device), self._directions(2 * slots.kind + side, mean.device), out=mean)


def centred(whole: Integers, scales: Scales) -> NDArray[np.float32]:
    """Return the mean of each integer's bin, in quantiser steps; both have the shape (k,)."""
    # Nearly all are small, and looked up in a table that stays in the processor's nearest cache.
    index = scales.astype(np.int32)
    index -= SMALLEST
    index *= 2 * _SHORT + 1
    index += whole
    index += _SHORT
    centre: NDArray[np.float32] = _short_centres().take(index, mode="clip")
    far = np.flatnonzero(np.abs(whole) > _SHORT)
    centre[far] = _far_centres(whole[far], scales[far])
    return centre


@cache
def _short_centres() -> NDArray[np.float32]:
    """Return the centres of -31 ... 31 under each scale, in one row."""
    values, scales = np.meshgrid(np.arange(-_SHORT, _SHORT + 1, dtype=np.int32), np.arange(SMALLEST, LARGEST + 1))
    return _far_centres(values.ravel(), scales.ravel())


def _far_centres(whole: Integers, scales: Scales) -> NDArray[np.float32]:
    table, starts = centre_table()
    indices = scales.astype(np.int64) - SMALLEST
    entries = starts.take(indices) + np.abs(whole)
    is_listed = entries < starts.take(indices + 1)  # beyond, the middle of the bin
    found = np.where(is_listed, table.take(np.where(is_listed, entries, 0)), np.abs(whole))
    return np.copysign(found, whole).astype(np.float32)


def _profiles_along(subspace: InitialSubspace, kind: int) -> Profiles:
    """Return the profiles of the rows of the subspace, (L, R): integers beyond a module's rank are zero."""
    is_row = np.arange(subspace.rows(kind)) < subspace.ranks_of(kind)[:, None]
    return np.where(is_row, 0, -4 * EXTREME).astype(np.int16)


def _half_octaves(size: int) -> int:
    """Return log2 of the square root of a size, in eighths."""
    return round(OCTAVE * math.log2(size) / 2)


def _clipped(indices: NDArray[np.int16]) -> NDArray[np.int8]:
    return np.clip(indices, SMALLEST, LARGEST, out=indices).astype(np.int8)


def log2_norms(norm: torch.Tensor) -> Norms:
    """Return log2 of norms in whole eighths, shape (n,)."""
    return _eighths(norm.log2())


def norm_of(norms: Norms) -> torch.Tensor:
    """Return norms as floats, shape (n,)."""
    return torch.from_numpy(np.exp2(norms / OCTAVE).astype(np.float32))


def _eighths(log2: torch.Tensor) -> NDArray[np.int64]:
    """Round to whole eighths."""
    return np.clip(np.rint(log2.detach().numpy() * float(OCTAVE)), -EXTREME, EXTREME).astype(np.int64)
