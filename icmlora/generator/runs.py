"""The integers of one module kind by their scales, found without a sort of the integers.

    scale index  =  level of the slot  +  profile of the channel

So with the channels of each layer ordered once by their profile, which the generator knows, the integers of a slot are
a few runs of one scale. Runs are ordered by scale; within a run, integers follow the order of the channels.

    values of a kind, in one row:   inputs (n, in) | outputs (n, out) | along (n, R)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from icmlora.generator.entropy_coding import Integers, Places, ScaleGroup
from icmlora.generator.scales import LARGEST, SMALLEST

Profiles = NDArray[np.int16]  # log2 of how far each channel is above its layer's mean, in eighths, shape (L, size)


class ChannelOrder:
    """The channels of each layer, ordered by their profile, and where each profile begins."""

    def __init__(self, profiles: Profiles) -> None:
        self.size = profiles.shape[1]
        self.channels = np.argsort(profiles, axis=1, kind="stable").astype(np.int32)  # (L, size)
        ordered = np.take_along_axis(profiles, self.channels, axis=1)
        begins = np.diff(ordered, axis=1, prepend=ordered[:, :1] - 1) != 0
        self._first = np.flatnonzero(begins)  # flat index of each run's first channel, layer after layer
        self._length = np.diff(self._first, append=ordered.size)
        self._profile = ordered.ravel()[self._first].astype(np.int64)
        self._count = begins.sum(axis=1)  # runs of each layer, (L,)
        self._begin = np.cumsum(self._count) - self._count

    def runs(self, layer: NDArray[np.int64], level: NDArray[np.int64], side: int, origin: int) -> Runs:
        """Return the runs of n slots with levels (n,); the first one's values begin at `origin`."""
        counts = self._count[layer]
        slot = np.repeat(np.arange(len(layer)), counts)
        # 0, 1, ... within each slot, from the first run of its layer on.
        run = np.arange(len(slot)) - np.repeat(np.cumsum(counts) - counts - self._begin[layer], counts)
        scales = np.clip(level[slot] + self._profile[run], SMALLEST, LARGEST).astype(np.int8)
        sides = (side * len(layer) + slot).astype(np.int32)
        origins = origin + slot * self.size
        return Runs(scales, self._length[run], sides, origins, self._first[run], self.channels.ravel())


@dataclass(frozen=True, eq=False)
class Nonzeros:
    """The k integers of a kind that are not zero."""

    places: Places  # where they are in the row of all values, shape (k,)
    values: Integers  # shape (k,)
    scales: NDArray[np.int8]  # scale indices, shape (k,)
    sides: Integers  # whose they are: 0 ... n-1 are the inputs of the slots, then come their outputs, then along

    def dense(self, count: int) -> Integers:
        """Return all values of the kind, shape (count,)."""
        row = np.zeros(count, dtype=np.int32)
        row[self.places] = self.values
        return row

    def __eq__(self, other: object) -> bool:
        """Whether the same values stand at the same places, in whatever order."""
        if not isinstance(other, Nonzeros) or len(self.places) != len(other.places):
            return False
        count = 1 + int(max(self.places.max(initial=-1), other.places.max(initial=-1)))
        return np.array_equal(self.dense(count), other.dense(count))


@dataclass(frozen=True, eq=False)
class Runs:
    """S runs of integers of one scale each."""

    scales: NDArray[np.int8]  # scale index, shape (S,)
    lengths: Places  # shape (S,)
    sides: Integers  # of the n slots: their inputs, their outputs, and along, shape (S,)
    origins: Places  # where the values of a run's side begin, shape (S,)
    firsts: Places  # which entry of `channels` is its first one, shape (S,)
    channels: Integers  # channels of several layers, in the order of their profiles

    @classmethod
    def joined(cls, parts: Sequence[Runs]) -> Runs:
        """Join runs, ordered by scale."""
        shifts = np.cumsum([0, *(len(part.channels) for part in parts)])
        firsts = np.concatenate([part.firsts + shift for part, shift in zip(parts, shifts, strict=False)])
        scales, lengths, sides, origins, channels = (
            np.concatenate([getattr(part, name) for part in parts])
            for name in ("scales", "lengths", "sides", "origins", "channels")
        )
        order = np.argsort((scales - SMALLEST).astype(np.uint8), kind="stable")
        return cls(scales[order], lengths[order], sides[order], origins[order], firsts[order], channels)

    @cached_property
    def sizes(self) -> list[tuple[int, int]]:
        """Each scale index, ascending, with the number of its integers."""
        counts = np.bincount(self.scales.astype(np.int64) - SMALLEST, weights=self.lengths)
        return [(key + SMALLEST, count) for key, count in enumerate(counts.astype(np.int64).tolist()) if count]

    def nonzeros(self, groups: Sequence[ScaleGroup]) -> Nonzeros:
        """Say where the integers of each scale are in the row of all values."""
        starts = np.cumsum([0, *(group.count for group in groups)])
        at = np.concatenate([np.zeros(0, np.int64), *(g.places + s for g, s in zip(groups, starts, strict=False))])
        ends = np.cumsum(self.lengths)
        counts = np.diff(np.searchsorted(at, ends), prepend=0)  # nonzeros of each run
        shift = np.repeat(self.firsts - (ends - self.lengths), counts)
        places = self.channels.take(at + shift) + np.repeat(self.origins, counts)
        values = np.concatenate([np.zeros(0, np.int32), *(group.values for group in groups)])
        return Nonzeros(places, values, np.repeat(self.scales, counts), np.repeat(self.sides, counts))

    def groups(self, found: Nonzeros) -> list[ScaleGroup]:
        """Return the integers of each scale."""
        ends = np.cumsum(self.lengths)
        row = found.dense(int(ends[-1]) if len(ends) else 0)
        run = np.repeat(np.arange(len(ends)), self.lengths)
        shift = self.firsts - (ends - self.lengths)
        ordered = row.take(self.channels.take(np.arange(len(run)) + shift.take(run)) + self.origins.take(run))
        parts = np.split(ordered, np.cumsum([count for _, count in self.sizes])[:-1])
        return [ScaleGroup.of(scale, part) for (scale, _), part in zip(self.sizes, parts, strict=False)]
