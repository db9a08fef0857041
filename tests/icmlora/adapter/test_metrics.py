"""The distortion of dW, against the definition computed in full."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, strategies as st

from icmlora.adapter.metrics import distance, dw_norm, errors_by_group, squared_error
from icmlora.adapter.model import Adapter
from tests.icmlora.adapter_files import Q0, V0, adapter

Pair = tuple[torch.Tensor, torch.Tensor]


def pair(seed: int, rank: int = 2) -> Pair:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rank, 6, generator=generator), torch.randn(5, rank, generator=generator)


def dw(factors: Pair) -> torch.Tensor:
    return factors[1].double() @ factors[0].double()


@given(seeds=st.tuples(*[st.integers(0, 10**6)] * 4), ranks=st.tuples(st.integers(1, 7), st.integers(1, 7)))
def test_the_error_is_the_squared_frobenius_error_of_dw(seeds: tuple[int, ...], ranks: tuple[int, int]) -> None:
    left = [pair(seed, ranks[0]) for seed in seeds[:2]]
    right = [pair(seed, ranks[1]) for seed in seeds[2:]]
    wanted = sum(float((dw(x) - dw(y)).square().sum()) for x, y in zip(left, right, strict=True))
    wanted /= sum(float(dw(x).square().sum()) for x in left)
    original, other = (adapter((Q0, *both[0]), (V0, *both[1])) for both in (left, right))
    assert squared_error(original, other) == pytest.approx(wanted, rel=1e-9, abs=1e-12)


def test_an_adapter_has_no_error_against_itself() -> None:
    one = adapter((Q0, *pair(0)))
    assert squared_error(one, one) < 1e-15


def test_the_gauge_does_not_matter() -> None:
    a, b = pair(0)
    assert squared_error(adapter((Q0, a, b)), adapter((Q0, 4 * a, b / 4))) < 1e-15


def test_a_module_that_is_missing_counts_as_zero() -> None:
    both = adapter((Q0, *pair(0)), (V0, *pair(1)))
    q, v = adapter((Q0, *pair(0))), adapter((V0, *pair(1)))
    share = dw_norm(v) ** 2 / dw_norm(both) ** 2
    assert squared_error(both, q) == pytest.approx(share)
    assert squared_error(q, both) == pytest.approx(dw_norm(v) ** 2 / dw_norm(q) ** 2)


def test_an_adapter_of_zeros_has_the_error_one() -> None:
    a, b = pair(0)
    assert squared_error(adapter((Q0, a, b)), adapter((Q0, a, b * 0))) == pytest.approx(1.0)


def test_against_an_original_of_zeros_the_error_is_infinite_or_none() -> None:
    a, b = pair(0)
    zero = adapter((Q0, a, b * 0))
    assert squared_error(zero, adapter((Q0, a, b))) == math.inf
    assert squared_error(zero, zero) == 0.0


def test_the_norm_is_the_frobenius_norm() -> None:
    assert dw_norm(adapter((Q0, *pair(0)))) == pytest.approx(float(dw(pair(0)).norm()))


def test_different_widths_are_an_error() -> None:
    a, b = pair(0)
    other: Adapter = adapter((Q0, a[:, :-1], b))
    with pytest.raises(ValueError, match="different widths"):
        squared_error(adapter((Q0, a, b)), other)


def test_an_adapter_names_each_module_once() -> None:
    with pytest.raises(ValueError, match="unique name"):
        adapter((Q0, *pair(0)), (Q0, *pair(1)))


def test_a_group_has_the_error_of_its_modules_alone() -> None:
    original, other = (adapter((Q0, *pair(seed)), (V0, *pair(seed + 1, rank=3))) for seed in (0, 5))
    v, q = errors_by_group(original, {"code": other}, lambda module: module.rpartition(".")[2])
    assert (v.group, v.modules, v.parameters) == ("v_proj", 1, 33)
    for found, module in ((q, Q0), (v, V0)):
        alone = [adapter(*((m.name, m.a, m.b) for m in one.modules if m.name == module)) for one in (original, other)]
        assert found.errors["code"] == pytest.approx(math.sqrt(squared_error(*alone)))


@given(seeds=st.tuples(*[st.integers(0, 10**6)] * 4), ranks=st.tuples(st.integers(1, 7), st.integers(1, 7)))
def test_the_distance_is_symmetric_and_that_of_dw_in_full(seeds: tuple[int, ...], ranks: tuple[int, int]) -> None:
    left = [pair(seed, ranks[0]) for seed in seeds[:2]]
    right = [pair(seed, ranks[1]) for seed in seeds[2:]]
    error = sum(float((dw(x) - dw(y)).square().sum()) for x, y in zip(left, right, strict=True))
    largest = max(sum(float(dw(x).square().sum()) for x in side) for side in (left, right))
    one, other = (adapter((Q0, *both[0]), (V0, *both[1])) for both in (left, right))
    assert distance(one, other) == pytest.approx(math.sqrt(error / largest), abs=1e-6)
    assert distance(one, other) == pytest.approx(distance(other, one), abs=1e-6)


@given(seed=st.integers(0, 10**6), rank=st.integers(1, 5))
def test_the_same_dw_in_other_factors_has_no_distance(seed: int, rank: int) -> None:
    a, b = pair(seed, rank)
    wide = adapter((Q0, torch.cat([2 * a, a]), torch.cat([b / 4, b / 2], dim=1)))
    assert distance(adapter((Q0, a, b)), wide) == 0.0


def test_a_module_of_other_widths_is_another_module() -> None:
    one, other = adapter((Q0, *pair(0))), adapter((Q0, torch.ones(2, 7), torch.ones(5, 2)))
    norms = [dw_norm(side) for side in (one, other)]
    assert distance(one, other) == pytest.approx(math.hypot(*norms) / max(norms))
