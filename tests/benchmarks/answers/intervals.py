"""95 % intervals of shares, of differences of paired shares, and of means over tasks.

    share                 Wilson's score interval
    difference of two     Newcombe's score interval for paired shares (Statistics in Medicine 17, 1998, method 10)
    mean over tasks       from the limits of each task (MOVER; Zou and Donner, Statistics in Medicine 27, 2008)

All stay sensible where no row or every row is right, which a bootstrap does not. The tasks count as given: a mean says
what other rows of the same tasks would give, and nothing about other tasks.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

_Z = 1.959963984540054  # of 95 %


@dataclass(frozen=True)
class Estimate:
    """A value and its 95 % interval."""

    value: float
    low: float
    high: float


def share(right: int, rows: int) -> Estimate:
    """Return the share of rows that are right."""
    value, square = right / rows, _Z * _Z
    middle = (value + square / (2 * rows)) / (1 + square / rows)
    half = _Z * math.sqrt(value * (1 - value) / rows + square / (4 * rows * rows)) / (1 + square / rows)
    return Estimate(value, max(0.0, middle - half), min(1.0, middle + half))


def difference(first: Sequence[bool], second: Sequence[bool]) -> Estimate:
    """Return by how much the share of the first is above that of the second, row by row the same questions."""
    pairs = list(zip(first, second, strict=True))
    rows = len(pairs)
    both, only_first, only_second, neither = (
        pairs.count(pair) for pair in ((True, True), (True, False), (False, True), (False, False))
    )
    one, two = share(both + only_first, rows), share(both + only_second, rows)
    correlation = _correlation(both, only_first, only_second, neither)
    low = _together(one.value - one.low, two.high - two.value, correlation)
    high = _together(one.high - one.value, two.value - two.low, correlation)
    value = (only_first - only_second) / rows
    return Estimate(value, value - low, value + high)


def mean(estimates: Sequence[Estimate]) -> Estimate:
    """Return the mean of estimates of independent tasks."""
    count = len(estimates)
    value = math.fsum(one.value for one in estimates) / count
    below = math.hypot(*(one.value - one.low for one in estimates)) / count
    above = math.hypot(*(one.high - one.value for one in estimates)) / count
    return Estimate(value, value - below, value + above)


def _correlation(both: int, only_first: int, only_second: int, neither: int) -> float:
    """Return the correlation of paired answers, corrected for continuity as Newcombe does."""
    margins = (both + only_first) * (only_second + neither) * (both + only_second) * (only_first + neither)
    if margins == 0:
        return 0.0
    product = both * neither - only_first * only_second
    rows = both + only_first + only_second + neither
    return (max(0.0, product - rows / 2) if product > 0 else product) / math.sqrt(margins)


def _together(first: float, second: float, correlation: float) -> float:
    return math.sqrt(max(0.0, first * first - 2 * correlation * first * second + second * second))
