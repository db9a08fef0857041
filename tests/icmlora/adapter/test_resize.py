"""Cutting ranks: the best adapter of so many values, and what that costs."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from hypothesis import given, strategies as st

from icmlora.adapter.metrics import errors_by_group, squared_error
from icmlora.adapter.model import Adapter, LoraModule
from icmlora.adapter.module_groups import grouping
from icmlora.adapter.resize import RankedSlots
from tests.icmlora.small_fleet import make_adapter

KINDS = st.sets(st.sampled_from(("q_proj", "v_proj", "down_proj")), min_size=1).map(sorted)
ADAPTERS = st.builds(make_adapter, seed=st.integers(0, 2**31 - 1), rank=st.integers(1, 6), kinds=KINDS)


def dense(module: LoraModule) -> torch.Tensor:
    return module.b.double() @ module.a.double()


def values_of(adapter: Adapter) -> int:
    return sum(shape.parameters for shape in adapter.layout)


@given(ADAPTERS, st.data())
def test_more_values_never_have_a_larger_error(adapter: Adapter, data: st.DataObject) -> None:
    slots = RankedSlots.of(adapter)
    counts = sorted(data.draw(st.lists(st.integers(0, len(slots.order)), min_size=2, max_size=2)))
    less, more = (squared_error(adapter, slots.first(count)) for count in counts)
    assert more <= less + 1e-12


@given(ADAPTERS, st.data())
def test_the_error_is_that_of_the_singular_values_that_were_cut(adapter: Adapter, data: st.DataObject) -> None:
    slots = RankedSlots.of(adapter)
    small = slots.first(data.draw(st.integers(0, len(slots.order))))
    lost = whole = 0.0
    for module, rank in zip(adapter.modules, [shape.rank for shape in small.layout], strict=True):
        squares = torch.linalg.svdvals(dense(module)).square()
        lost, whole = lost + float(squares[rank:].sum()), whole + float(squares.sum())
    assert squared_error(adapter, small) == pytest.approx(lost / whole, abs=1e-9)


@given(ADAPTERS, st.floats(0, 1))
def test_what_fits_takes_at_most_the_values_and_one_slot_more_does_not(adapter: Adapter, share: float) -> None:
    slots = RankedSlots.of(adapter)
    limit = slots.values[0] + share * (slots.values[-1] - slots.values[0])
    count = slots.within(limit)
    assert values_of(slots.first(count)) == slots.values[count] <= limit
    assert count == len(slots.order) or slots.values[count + 1] > limit


@given(seed=st.integers(0, 10**6), data=st.data())
def test_no_other_choice_of_ranks_is_better(seed: int, data: st.DataObject) -> None:
    adapter = make_adapter(seed, 3, kinds=["q_proj", "down_proj"])
    slots = RankedSlots.of(adapter)
    count = data.draw(st.integers(0, len(slots.order)))
    found, limit = slots.first(count), slots.values[count]
    shapes = adapter.layout
    squares = [torch.linalg.svdvals(dense(module)).square() for module in adapter.modules]
    best = min(
        sum(float(one[rank:].sum()) for one, rank in zip(squares, ranks, strict=True))
        for ranks in product(range(1, 4), repeat=len(shapes))
        if sum(rank * (shape.inputs + shape.outputs) for rank, shape in zip(ranks, shapes, strict=True)) <= limit
    )
    assert squared_error(adapter, found) == pytest.approx(best / sum(float(one.sum()) for one in squares), abs=1e-9)


def test_a_module_that_does_nothing_keeps_one_slot() -> None:
    adapter = make_adapter(0, 3)
    first = adapter.modules[0]
    silent = LoraModule(first.name, first.a, torch.zeros_like(first.b))
    slots = RankedSlots.of(Adapter("tiny", None, adapter.target_modules, (silent, *adapter.modules[1:])))
    assert slots.first(len(slots.order)).layout[0].rank == 1


def test_errors_are_given_for_each_kind_of_modules() -> None:
    adapter = make_adapter(0, 2)
    cut = RankedSlots.of(adapter).first(0)
    groups = errors_by_group(adapter, {"cut": cut, "same": adapter}, grouping(is_for_images=False))
    kinds = {group.group: group.errors["cut"] for group in groups}
    assert set(kinds) == {module.name.rpartition(".")[2] for module in adapter.modules}
    whole = math.sqrt(squared_error(adapter, cut))
    assert min(kinds.values()) <= whole <= max(kinds.values())
    assert {group.errors["same"] for group in groups} == {0.0}
    assert math.isfinite(whole)


@pytest.mark.parametrize(("name", "kind"), [("experts.3", "experts"), ("7", "7"), ("a.gate_proj.0.1", "gate_proj")])
def test_members_of_a_list_are_of_one_kind(name: str, kind: str) -> None:
    assert grouping(is_for_images=False)(name) == kind
