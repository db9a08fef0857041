"""Bjontegaard's difference of two rate curves: the mean ratio of bytes at equal retained gain.

    log bytes as a function of gain, by monotone piecewise cubic interpolation (Fritsch and Carlson, 1980);
    exp(mean difference over the gains that both curves reach) - 1

A curve is the frontier of its points: those that no other point of the method beats in bytes and in gain.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Curve = tuple[tuple[float, float], ...]
"""(bytes, gain), both ascending."""
_SAMPLES = 2001


@dataclass(frozen=True)
class BdRate:
    """A BD-rate and the range of gains that it is over."""

    rate: float
    lowest_gain: float
    highest_gain: float


def frontier(points: Iterable[tuple[float, float]]) -> Curve:
    """Return the points that are the best for their bytes, by ascending bytes."""
    best: list[tuple[float, float]] = []
    for size, gain in sorted(points, key=lambda point: (point[0], -point[1])):
        if math.isfinite(gain) and (not best or gain > best[-1][1]):
            best.append((size, gain))
    return tuple(best)


def envelope(curves: Iterable[Curve]) -> Curve:
    """Return the frontier of several curves together."""
    return frontier(point for curve in curves for point in curve)


def bd_rate(curve: Curve, reference: Curve, lowest: float = -math.inf) -> BdRate | None:
    """Return how many bytes more (or, negative, fewer) a curve needs for the same gain, over gains from `lowest` on.

    None where a curve has less than two points or the two share no such range of gain.
    """
    if min(len(curve), len(reference)) < 2:
        return None
    low, high = max(lowest, curve[0][1], reference[0][1]), min(curve[-1][1], reference[-1][1])
    if not low < high:
        return None
    gains = np.linspace(low, high, _SAMPLES)
    difference = _log_bytes(curve, gains) - _log_bytes(reference, gains)
    return BdRate(math.expm1(float(np.trapezoid(difference, gains) / (high - low))), low, high)


def _log_bytes(curve: Curve, gains: NDArray[np.float64]) -> NDArray[np.float64]:
    sizes, knots = np.array(curve).T
    return pchip(knots, np.log(sizes), gains)


def pchip(x: NDArray[np.float64], y: NDArray[np.float64], at: NDArray[np.float64]) -> NDArray[np.float64]:
    """Interpolate without overshoot between points of ascending x; a straight line between two points."""
    step, slope = np.diff(x), np.diff(y) / np.diff(x)
    tangents = np.empty_like(y)
    tangents[[0, -1]] = slope[0], slope[-1]
    if len(x) > 2:
        left, right = 2 * step[1:] + step[:-1], step[1:] + 2 * step[:-1]
        with np.errstate(divide="ignore", invalid="ignore"):
            harmonic = (left + right) / (left / slope[:-1] + right / slope[1:])
        tangents[1:-1] = np.where(slope[:-1] * slope[1:] > 0, harmonic, 0.0)
        tangents[0] = _end(step[0], step[1], slope[0], slope[1])
        tangents[-1] = _end(step[-1], step[-2], slope[-1], slope[-2])
    place = np.clip(np.searchsorted(x, at, side="right") - 1, 0, len(step) - 1)
    t = (at - x[place]) / step[place]
    rise = step[place] * (t * (1 - t) ** 2 * tangents[place] - t**2 * (1 - t) * tangents[place + 1])
    return np.asarray(y[place] + (y[place + 1] - y[place]) * (3 - 2 * t) * t**2 + rise)


def _end(step: float, next_step: float, slope: float, next_slope: float) -> float:
    """Return the tangent at an end: of the parabola through three points, as far as it keeps the shape."""
    tangent = ((2 * step + next_step) * slope - step * next_slope) / (step + next_step)
    if tangent * slope <= 0:
        return 0.0
    if slope * next_slope <= 0 and abs(tangent) > 3 * abs(slope):
        return 3 * slope
    return float(tangent)
