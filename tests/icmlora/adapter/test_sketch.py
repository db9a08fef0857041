"""Sketches estimate distances of dW, and find every pair within a limit."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

from icmlora.adapter.arithmetic import plus, times, truncated, with_modules
from icmlora.adapter.metrics import distance, dw_norm
from icmlora.adapter.model import Adapter, LoraModule
from icmlora.adapter.sketch import SKETCH_SIZE, near_pairs, sketch
from tests.icmlora.adapter_files import Q0, V0, adapter
from tests.icmlora.small_fleet import make_adapter

seeds = st.integers(0, 10**6)


def random_pair(seed: int, rank: int = 2, inputs: int = 24, outputs: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(rank, inputs, generator=draw), torch.randn(outputs, rank, generator=draw)


def near(one: Adapter, other: Adapter, share: float) -> Adapter:
    """Add a share of another adapter to one."""
    scale = share * dw_norm(one) / dw_norm(other)
    return plus(one, times(other.modules, scale))


def found(adapters: Sequence[Adapter], limit: float) -> set[tuple[int, int]]:
    sketches, norms = np.stack([sketch(one) for one in adapters]), np.array([dw_norm(one) for one in adapters])
    return set(near_pairs(sketches, norms, limit))


def within(adapters: Sequence[Adapter], limit: float) -> set[tuple[int, int]]:
    pairs = [(left, right) for right in range(len(adapters)) for left in range(right)]
    return {pair for pair in pairs if distance(adapters[pair[0]], adapters[pair[1]]) <= limit}


@given(seeds, st.integers(1, 5))
def test_the_gauge_does_not_matter(seed: int, rank: int) -> None:
    a, b = random_pair(seed, rank)
    mixing = torch.linalg.qr(torch.randn(rank, rank, generator=torch.Generator().manual_seed(seed)))[0]
    one, other = sketch(adapter((Q0, a, b))), sketch(adapter((Q0, 2 * mixing @ a, b @ mixing.mT / 2)))
    assert np.allclose(one, other, atol=1e-4 * np.linalg.norm(one))


@given(seeds)
def test_more_rank_for_the_same_dw_gives_the_same_sketch(seed: int) -> None:
    a, b = random_pair(seed)
    wide = adapter((Q0, torch.cat([a, a]), torch.cat([b, b], dim=1) / 2))
    one, other = sketch(adapter((Q0, a, b))), sketch(wide)
    assert np.allclose(one, other, atol=1e-4 * np.linalg.norm(one))


@pytest.mark.slow
@given(seeds, seeds)
def test_the_sketch_of_a_sum_is_the_sum_of_the_sketches(one: int, other: int) -> None:
    left, right = make_adapter(one), make_adapter(other)
    both = sketch(plus(left, right.modules))
    assert np.allclose(both, sketch(left) + sketch(right), atol=1e-4 * np.linalg.norm(both))


def test_a_sketch_is_the_same_on_every_machine() -> None:
    ones = adapter((Q0, torch.ones(1, 6), torch.ones(5, 1)))
    assert sketch(ones).shape == (SKETCH_SIZE,)
    assert (32 * sketch(ones)[:6]).tolist() == pytest.approx([0, 0, 2, 2, 6, -2])


def test_the_order_of_modules_does_not_matter_but_their_names_do() -> None:
    one, other = random_pair(1), random_pair(2)
    plain = sketch(adapter((Q0, *one), (V0, *other)))
    assert np.array_equal(plain, sketch(adapter((V0, *other), (Q0, *one))))
    swapped = sketch(adapter((V0, *one), (Q0, *other)))
    assert np.linalg.norm(plain - swapped) > np.linalg.norm(plain)


def test_the_estimate_is_right_on_average() -> None:
    # The names draw the signs, so many names are many independent estimates.
    a, b = random_pair(0, rank=1)
    squares = [float(np.sum(sketch(adapter((f"layers.{seed}.q", a, b))) ** 2)) for seed in range(400)]
    true = dw_norm(adapter(("q", a, b))) ** 2
    assert np.mean(squares) == pytest.approx(true, rel=0.05)


def test_the_widest_estimate_has_the_deviation_that_the_margin_was_chosen_for() -> None:
    a, b = random_pair(0, rank=1, inputs=64, outputs=64)
    true = dw_norm(adapter(("q", a, b))) ** 2
    ratios = np.array([np.sum(sketch(adapter((f"layers.{seed}.q", a, b))) ** 2) / true for seed in range(1000)])
    assert ratios.std() < 0.30
    assert ratios.max() < 3.0


@pytest.mark.slow
@given(st.lists(seeds, min_size=2, max_size=5, unique=True), st.sampled_from([0.02, 0.1, 0.3, 0.5]))
def test_every_pair_within_the_limit_is_found(origins: list[int], limit: float) -> None:
    fleet: list[Adapter] = []
    for origin in origins:
        one = make_adapter(origin, rank=4)
        fleet += [one, near(one, make_adapter(origin + 7), 0.9 * limit), near(one, make_adapter(origin + 9), 3 * limit)]
        fleet += [truncated(one, 2)]
    assert found(fleet, limit) >= within(fleet, limit)


@given(seeds)
def test_a_pair_that_differs_in_one_module_of_rank_1_is_found(seed: int) -> None:
    one = make_adapter(seed)
    (first, *others) = one.modules
    spot = LoraModule(first.name, *random_pair(seed + 1, rank=1, inputs=first.a.shape[1], outputs=first.b.shape[0]))
    changed = near(one, with_modules(one, [spot]), 0.0999)
    assert others
    assert distance(one, changed) <= 0.1
    assert found([one, changed], 0.1) == {(0, 1)}


def test_unrelated_adapters_are_no_candidates() -> None:
    fleet = [make_adapter(seed, own=5.0) for seed in range(20)]
    assert found(fleet, 0.1) == set()


@pytest.mark.slow
def test_a_pair_across_two_blocks_is_found_once() -> None:
    draw = np.random.default_rng(0)
    sketches = draw.standard_normal((2500, SKETCH_SIZE)).astype(np.float32)
    sketches[2400] = sketches[3]
    norms = np.linalg.norm(sketches, axis=1).astype(np.float64)
    assert near_pairs(sketches, norms, 0.1) == [(3, 2400)]


@pytest.mark.parametrize("size", [1e-25, 1e25])
def test_a_pair_is_found_whatever_its_size(size: float) -> None:
    one, other = make_adapter(1), make_adapter(2)
    sizes = [(one, size), (one, 1.01 * size), (other, size)]
    assert found([with_modules(known, times(known.modules, factor)) for known, factor in sizes], 0.1) == {(0, 1)}


def test_no_adapters_have_no_pairs() -> None:
    assert near_pairs(np.empty((0, SKETCH_SIZE), np.float32), np.empty(0), 0.1) == []
