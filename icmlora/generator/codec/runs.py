"""The integers of one module kind grouped by scale, without sorting the integers.

    scale index  =  level of the slot  +  profile of the channel

The generator knows the profiles. Once the channels of each layer are ordered by profile, the integers of a slot are a
few runs of one scale each. Runs are ordered by scale; within a run, integers follow the order of the channels.

    values of a kind, in one row:   inputs (n, in) | outputs (n, out) | along (n, R)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from icmlora.generator.files.entropy_coding import Integers, Places, Sizes
from icmlora.generator.scales import LARGEST, SMALLEST

_BYTE = 127  # largest magnitude that fits into a byte

Profiles = NDArray[np.int16]  # log2 of how far each channel is above its layer's mean, in eighths, shape (L, size)


class ChannelOrder:
    """The channels of each layer, ordered by their profile, and where each profile begins."""

    def __init__(self, profiles: Profiles) -> None:
        self.size = profiles.shape[1]
        ordered = np.argsort(profiles, axis=1, kind="stable").astype(np.int32)  # (L, size)
        profiles = np.take_along_axis(profiles, ordered, axis=1)
        begins = np.diff(profiles, axis=1, prepend=profiles[:, :1] - 1) != 0
        self.channels = ordered.ravel()  # layer after layer, as everything here
        self.first = np.flatnonzero(begins)  # index of each run's first channel
        self.length = np.diff(self.first, append=profiles.size)
        self.profile = profiles.ravel()[self.first].astype(np.int64)
        self.count = begins.sum(axis=1)  # runs of each layer, (L,)

    @cached_property
    def places(self) -> Integers:
        """Position of each channel among the ordered ones."""
        places = np.empty(len(self.channels), dtype=np.int32)
        layer = np.arange(len(places), dtype=np.int32) // max(self.size, 1) * self.size
        places[layer + self.channels] = np.arange(len(places), dtype=np.int32)
        return places


@dataclass(frozen=True, eq=False)
class Nonzeros:
    """The k nonzero integers of a kind."""

    places: Places  # where they are in the row of all values, shape (k,)
    values: Integers  # shape (k,)
    scales: NDArray[np.int8]  # scale indices, shape (k,)
    sides: Integers  # their vectors: 0 ... n-1 are the inputs of the slots, then come their outputs, then along

    def kept(self, keep: NDArray[np.bool_], sizes: Sequence[int]) -> Nonzeros:
        """Keep only the slots in a mask (n,)."""
        masks = np.tile(keep, len(sizes))
        whose = np.cumsum(masks, dtype=np.int32) - 1
        starts = starts_of(int(keep.sum()), sizes)
        moved = np.zeros(len(masks), dtype=np.int64)
        moved[masks] = starts - starts_of(len(keep), sizes)[masks]
        chosen = masks.take(self.sides)
        sides = self.sides[chosen]
        return Nonzeros(
            self.places[chosen] + moved.take(sides), self.values[chosen], self.scales[chosen], whose.take(sides)
        )

    def dense(self, count: int) -> Integers:
        """Return all values of the kind, shape (count,)."""
        row = np.zeros(count, dtype=np.int32)
        row[self.places] = self.values
        return row

    def __eq__(self, other: object) -> bool:
        """Return whether both have the same values at the same places, in any order."""
        if not isinstance(other, Nonzeros) or len(self.places) != len(other.places):
            return False
        count = 1 + int(max(self.places.max(initial=-1), other.places.max(initial=-1)))
        return np.array_equal(self.dense(count), other.dense(count))


class Runs:
    """Runs of integers of one scale each, ordered by scale, of n slots of a kind."""

    def __init__(self, orders: Sequence[ChannelOrder], layer: NDArray[np.int64], levels: Sequence[Places]) -> None:
        """Find the runs of slots with levels (n,) in layers (n,), by their inputs, outputs and along."""
        self._orders = orders
        self._starts = starts_of(len(layer), [order.size for order in orders])  # (3n,)
        shifts = np.cumsum([0, *(len(order.channels) for order in orders)])
        # Where each vector's layer begins among the channels of all sides.
        self._blocks = np.concatenate(
            [shift + order.size * layer for order, shift in zip(orders, shifts, strict=False)]
        )
        columns: list[list[NDArray[Any]]] = [[], [], [], []]
        for side, (order, level, shift) in enumerate(zip(orders, levels, shifts[:-1], strict=True)):
            counts = order.count[layer]
            slot = np.repeat(np.arange(len(layer)), counts)
            # 0, 1, ... within each slot, from the first run of its layer on.
            begin = (np.cumsum(order.count) - order.count)[layer]
            run = np.arange(len(slot)) - np.repeat(np.cumsum(counts) - counts - begin, counts)
            scales = np.clip(level[slot] + order.profile[run], SMALLEST, LARGEST).astype(np.int8)
            found = scales, order.length[run], (slot + side * len(layer)).astype(np.int32), order.first[run] + shift
            for column, part in zip(columns, found, strict=True):
                column.append(part)
        scales, lengths, sides, firsts = map(np.concatenate, columns)
        ordered = np.argsort((scales - SMALLEST).astype(np.uint8), kind="stable")
        self._scales = scales[ordered]  # scale index, (S,)
        self._lengths, self._sides = lengths[ordered], sides[ordered]
        self._firsts = firsts[ordered]  # index of a run's first channel, among the channels of all sides
        self._begins = np.cumsum(self._lengths) - self._lengths  # of a run, among all integers in this order

    @cached_property
    def sizes(self) -> Sizes:
        """Each scale index, ascending, with the number of its integers."""
        counts = np.bincount(self._scales.astype(np.int64) - SMALLEST, weights=self._lengths)
        return [(key + SMALLEST, count) for key, count in enumerate(counts.astype(np.int64).tolist()) if count]

    def nonzeros(self, at: Places, values: Integers) -> Nonzeros:
        """Find the k nonzeros in the row of all values, given their ascending places in the runs."""
        counts = np.diff(np.searchsorted(at, self._begins + self._lengths), prepend=0)  # nonzeros of each run
        channels = np.concatenate([order.channels for order in self._orders])
        places = channels.take(at + np.repeat(self._firsts - self._begins, counts))
        row = places + np.repeat(self._starts.take(self._sides), counts)
        return Nonzeros(row, values, np.repeat(self._scales, counts), np.repeat(self._sides, counts))

    def places(self, parts: Sequence[Nonzeros], counts: Sequence[int]) -> tuple[Places, Integers]:
        """Return the ascending places of nonzeros in the runs, and their values: shape (k,).

        The parts have consecutive slots; `counts` are their numbers of slots.
        """
        # Distance from an integer's place among the ordered channels to its place in all runs, by vector and scale.
        # Runs that were clipped to one scale are consecutive in both, so the first one's distance holds for all.
        shifts = np.zeros((len(self._starts), LARGEST - SMALLEST + 1), dtype=np.int64)
        keys = self._sides[::-1], self._scales[::-1].astype(np.int64) - SMALLEST
        shifts[keys] = (self._begins - self._firsts)[::-1]
        sides = np.cumsum([0, *(len(order.channels) for order in self._orders)])
        ordered = np.concatenate([order.places + side for order, side in zip(self._orders, sides, strict=False)])
        sizes, begin = [order.size for order in self._orders], 0
        # One byte of each integer is written to its place: several times as fast as sorting the nonzeros.
        row, far = np.zeros(int(self._lengths.sum()), dtype=np.int8), [(np.zeros(0, np.int64), np.zeros(0, np.int32))]
        for part, count in zip(parts, counts, strict=True):
            slots = np.arange(begin, begin := begin + count)
            whose = (np.arange(len(sizes))[:, None] * sum(counts) + slots).ravel()  # the part's vectors among all
            at = ordered.take(part.places + (self._blocks[whose] - starts_of(count, sizes)).take(part.sides))
            at += shifts.ravel().take((shifts.shape[1] * whose - SMALLEST).take(part.sides) + part.scales)
            row[at] = np.clip(part.values, -_BYTE, _BYTE)
            beyond = np.flatnonzero(np.abs(part.values) > _BYTE)
            far.append((at.take(beyond), part.values.take(beyond)))
        places = np.flatnonzero(row != 0)
        values = row.take(places).astype(np.int32)
        far_places, far_values = (np.concatenate(column) for column in zip(*far, strict=True))
        values[np.searchsorted(places, far_places)] = far_values
        return places, values


def starts_of(count: int, sizes: Sequence[int]) -> Places:
    """Return where each vector begins in the row of a kind's values: `count` first sides, then second sides..."""
    origins = count * np.cumsum([0, *sizes])
    slots = np.arange(count)
    return np.concatenate([origin + size * slots for origin, size in zip(origins, sizes, strict=False)])
