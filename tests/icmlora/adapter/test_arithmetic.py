"""Sums of adapters are the sums of their dW."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, strategies as st

from icmlora.adapter import arithmetic as arithmetic
from icmlora.adapter.arithmetic import mean_adapter, plus, times, truncated, with_modules
from icmlora.adapter.model import Adapter
from tests.icmlora.small_fleet import make_adapter, same

SEEDS = st.integers(0, 2**31 - 1)
KINDS = st.sets(st.sampled_from(("q_proj", "v_proj", "down_proj")), min_size=1).map(sorted)
ADAPTERS = st.builds(make_adapter, seed=SEEDS, rank=st.integers(1, 8), kinds=KINDS)


def dense(adapter: Adapter) -> dict[str, torch.Tensor]:
    return {module.name: module.b.double() @ module.a.double() for module in adapter.modules}


def assert_near(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert set(found) == set(wanted)
    for name, other in wanted.items():
        assert torch.allclose(found[name], other, atol=1e-5 * (1 + float(other.norm())))


@given(ADAPTERS, ADAPTERS, st.floats(-3, 3))
def test_the_sum_of_two_has_the_sum_of_their_dw(left: Adapter, right: Adapter, factor: float) -> None:
    one, other = dense(left), dense(right)
    wanted = {
        name: one.get(name, torch.zeros(())) + factor * other.get(name, torch.zeros(())) for name in {**one, **other}
    }
    total = plus(left, times(right.modules, factor))
    assert_near(dense(total), wanted)
    assert set(total.target_modules) == set(left.target_modules) | set(right.target_modules)


@given(ADAPTERS, st.integers(1, 8))
def test_the_best_of_a_smaller_rank_has_the_strongest_directions(adapter: Adapter, rank: int) -> None:
    found = dense(truncated(adapter, rank))
    for name, whole in dense(adapter).items():
        u, s, v = torch.linalg.svd(whole, full_matrices=False)
        wanted = u[:, :rank] @ s[:rank].diag() @ v[:rank]
        assert torch.allclose(found[name], wanted, atol=1e-4 * (1 + float(whole.norm())))


@given(st.lists(ADAPTERS, min_size=1, max_size=5))
def test_the_mean_is_that_of_the_modules_that_half_of_them_have(adapters: list[Adapter]) -> None:
    parts = [dense(adapter) for adapter in adapters]
    owners = {name: sum(name in part for part in parts) for part in parts for name in part}
    most = {name for name, count in owners.items() if 2 * count >= len(parts)} or set(owners)
    wanted = {name: sum((part[name] for part in parts if name in part), torch.zeros(())) / len(parts) for name in most}
    assert_near(dense(mean_adapter(iter(adapters), 64)), wanted)


def test_a_mean_of_many_is_cut_on_the_way_and_stays_the_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arithmetic, "_WORKING_RANK", 48)  # dW is 24 wide at most here
    ranks = []

    def read() -> Iterator[Adapter]:
        for seed in range(20):
            ranks.append(make_adapter(seed, rank=8))
            yield ranks[-1]

    found = dense(mean_adapter(read(), 64))
    parts = [dense(adapter) for adapter in ranks]
    assert_near(found, {name: sum(part[name] for part in parts) / 20 for name in parts[0]})  # type: ignore[misc]


def test_no_adapters_have_no_mean() -> None:
    with pytest.raises(ValueError, match="no adapters"):
        mean_adapter([], 4)


def test_sums_leave_what_was_added_as_it_was() -> None:
    left, right = make_adapter(1), make_adapter(2)
    plus(left, times(right.modules, 2.0))
    truncated(left, 1)
    assert same(left, make_adapter(1))
    assert same(right, make_adapter(2))


def test_an_adapter_of_other_modules_names_their_targets() -> None:
    adapter = make_adapter(1, kinds=("q_proj", "v_proj"))
    some = with_modules(adapter, [module for module in adapter.modules if module.name.endswith("q_proj")])
    assert some.target_modules == ("q_proj",)
