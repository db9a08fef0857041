"""The lattice E8: the nearest point, and its points numbered shell by shell.

    E8 = D8 or D8 + (1/2, ..., 1/2),   D8 = whole vectors of length 8 with an even sum
    shell n = the points of squared length 2n:   1, 240, 2160, 6720, 17520, ... of them

Points are written doubled, so that their coordinates are whole: all even, or all odd, with a sum that 4 divides.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray

DIMENSION = 8
_QUARTER = 4  # doubled coordinates of a point sum to a multiple of it

Whole = NDArray[np.int64]


def nearest(values: torch.Tensor) -> torch.Tensor:
    """Return the point of E8 nearest to each row of an (n, 8) tensor (Conway and Sloane, 1982)."""
    whole, half = _nearest_d8(values), _nearest_d8(values - 0.5) + 0.5
    is_whole = (values - whole).square().sum(1) <= (values - half).square().sum(1)
    return torch.where(is_whole[:, None], whole, half)


def _nearest_d8(values: torch.Tensor) -> torch.Tensor:
    rounded = values.round()
    rest = values - rounded
    # Where the sum is odd, the coordinate that was rounded furthest goes to its other side instead.
    worst = rest.abs().argmax(dim=1, keepdim=True)
    side = torch.where(rest.gather(1, worst) >= 0, 1.0, -1.0)
    return rounded.scatter_add(1, worst, side * rounded.sum(dim=1, keepdim=True).remainder(2))


def shells(doubled: Whole) -> Whole:
    """Return the shell of each doubled point of shape (n, 8)."""
    return np.square(doubled).sum(axis=1) // 8


def shell_sizes(last: int) -> Whole:
    """Return how many points the shells 0 to `last` have."""
    even, odd = _coset_sizes(np.arange(last + 1), last)
    return even + odd


def numbers(doubled: Whole) -> Whole:
    """Return the number of each doubled point among those of its shell, shape (n,)."""
    last = int(shells(doubled).max(initial=0))
    left, total = np.square(doubled).sum(axis=1), np.zeros(len(doubled), dtype=np.int64)
    odd, found = doubled[:, 0] & 1, np.where(doubled[:, 0] & 1, _coset_sizes(shells(doubled), last)[0], 0)
    for place in range(DIMENSION):
        value = doubled[:, place]
        for before in range(-_reach(last), int(value.max(initial=0))):
            found += np.where(before < value, _ways(last, place, odd, total, left, before), 0)
        total, left = (total + value) % _QUARTER, left - value * value
    return found


def points(shell: Whole, number: Whole) -> Whole:
    """Return the doubled points of these numbers in their shells, shape (n, 8)."""
    last = int(shell.max(initial=0))
    even = _coset_sizes(shell, last)[0]
    odd = (number >= even).astype(np.int64)
    rest, left, total = number - odd * even, 8 * shell, np.zeros(len(shell), dtype=np.int64)
    found = np.zeros((len(shell), DIMENSION), dtype=np.int64)
    for place in range(DIMENSION):
        is_open = np.ones(len(shell), dtype=bool)
        for value in range(-_reach(last), _reach(last) + 1):
            ways = _ways(last, place, odd, total, left, value)
            chosen = is_open & (rest < ways)
            found[chosen, place] = value
            is_open &= ~chosen
            rest = np.where(is_open, rest - ways, rest)
        total, left = (total + found[:, place]) % _QUARTER, left - np.square(found[:, place])
    return found


def _reach(last: int) -> int:
    """Return the largest doubled coordinate in the shells up to the last."""
    return int((8 * last) ** 0.5)


def _coset_sizes(shell: Whole, last: int) -> tuple[Whole, Whole]:
    """Return how many points of each shell are whole, and how many are halves."""
    counts = _counts(last)[DIMENSION]
    return counts[0, 0, 8 * shell], counts[1, 0, 8 * shell]


def _ways(last: int, place: int, odd: Whole, total: Whole, left: Whole, value: int) -> Whole:
    """Return in how many ways points go on after a value at a place, given the sum before it and the length left."""
    fits = (left >= value * value) & (odd == (value & 1))
    counts = _counts(last)[DIMENSION - 1 - place]
    return np.where(fits, counts[odd, (-total - value) % _QUARTER, np.where(fits, left - value * value, 0)], 0)


@cache
def _counts(last: int) -> list[Whole]:
    """Return for k = 0 ... 8 the number of doubled vectors of length k: [odd or not, sum mod 4, squared length]."""
    size = 8 * last + 1
    counts = [np.zeros((2, _QUARTER, size), dtype=np.int64)]
    counts[0][:, 0, 0] = 1
    for _ in range(DIMENSION):
        following = np.zeros_like(counts[0])
        for value in range(-_reach(last), _reach(last) + 1):
            odd, square = value & 1, value * value
            following[odd, :, square:] += np.roll(counts[-1][odd], value, axis=0)[:, : size - square]
        counts.append(following)
    return counts
