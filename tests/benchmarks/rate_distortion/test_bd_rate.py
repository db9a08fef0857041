"""Frontiers, interpolation and BD-rates."""

from __future__ import annotations

import numpy as np
import pytest

from tests.benchmarks.rate_distortion.bd_rate import bd_rate, envelope, frontier, pchip

CURVE = ((10.0, 0.5), (20.0, 0.8), (40.0, 0.9), (80.0, 0.95))


def test_a_frontier_leaves_out_what_another_point_beats() -> None:
    assert frontier([(20, 0.8), (30, 0.7), (10, 0.5), (20, 0.6), (40, 0.8), (50, float("nan"))]) == (
        (10, 0.5),
        (20, 0.8),
    )


def test_the_envelope_takes_the_best_of_every_curve() -> None:
    assert envelope([((10, 0.5), (40, 0.9)), ((20, 0.8), (50, 0.85))]) == ((10, 0.5), (20, 0.8), (40, 0.9))


def test_half_the_bytes_at_every_gain_are_minus_fifty_percent() -> None:
    half = tuple((size / 2, gain) for size, gain in CURVE)
    found = bd_rate(half, CURVE)
    assert found is not None
    assert found.rate == pytest.approx(-0.5)
    assert (found.lowest_gain, found.highest_gain) == (0.5, 0.95)
    assert bd_rate(CURVE, half).rate == pytest.approx(1.0)  # type: ignore[union-attr]
    assert bd_rate(CURVE, CURVE).rate == pytest.approx(0.0)  # type: ignore[union-attr]


def test_gains_below_the_lowest_that_matters_do_not_count() -> None:
    crossing = tuple((size * (2 if gain < 0.8 else 0.5), gain) for size, gain in CURVE)
    every, high = bd_rate(crossing, CURVE), bd_rate(crossing, CURVE, 0.9)
    assert every is not None
    assert high is not None
    assert (high.lowest_gain, high.rate) == (0.9, pytest.approx(-0.5))
    assert every.rate > high.rate
    assert bd_rate(crossing, CURVE, 0.99) is None


def test_only_gains_that_both_curves_reach_count() -> None:
    found = bd_rate(((5.0, 0.6), (100.0, 0.99)), CURVE)
    assert found is not None
    assert (found.lowest_gain, found.highest_gain) == (0.6, 0.95)


@pytest.mark.parametrize("other", [(), ((10.0, 0.5),), ((10.0, 0.1), (20.0, 0.4))])
def test_curves_that_share_no_range_have_no_rate(other: tuple[tuple[float, float], ...]) -> None:
    assert bd_rate(CURVE, other) is None


def test_interpolation_meets_its_points_and_keeps_their_order() -> None:
    x, y = np.array([0.0, 1.0, 1.1, 3.0]), np.array([0.0, 5.0, 5.0, 6.0])
    fine = pchip(x, y, np.linspace(0, 3, 400))
    assert pchip(x, y, x) == pytest.approx(y)
    assert np.all(np.diff(fine) >= -1e-12)
    assert (fine.min(), fine.max()) == (pytest.approx(0.0), pytest.approx(6.0))


def test_interpolation_of_a_line_is_the_line() -> None:
    x = np.array([0.0, 1.0, 4.0])
    assert pchip(x, 2 * x + 1, np.array([0.5, 3.0])) == pytest.approx([2.0, 7.0])


def test_interpolation_is_that_of_fritsch_and_carlson() -> None:
    # What scipy.interpolate.PchipInterpolator gives.
    x, y = np.array([0.0, 1.0, 2.0, 4.0]), np.array([0.0, 1.0, 4.0, 5.0])
    assert pchip(x, y, np.array([0.5, 1.5, 3.0])) == pytest.approx([0.3125, 2.57112069, 4.73275862])
