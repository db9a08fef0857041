"""Codes of adapters whose initial A is known."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import example, given, strategies as st

from icmlora.adapter.layout import ModuleShape
from icmlora.adapter.metrics import dw_norm, squared_error
from icmlora.adapter.model import Adapter, LoraModule
from icmlora.errors import GeneratorError
from icmlora.generator.codec.codec import OpenCode
from icmlora.generator.codec.encoding import encode_adapter
from icmlora.generator.codec.limits import Limits
from icmlora.generator.codec.packing import KindIntegers
from icmlora.generator.files.entropy_coding import Integers
from icmlora.generator.initial_a.draw import InitialA, InitialModule
from tests.icmlora.peft_made import initial_of, peft_codec, peft_fleet, peft_made
from tests.icmlora.small_fleet import same, sides_of, with_factors

TASKS = [0, 1, 2]


def known(task: int) -> tuple[Adapter, InitialA]:
    """Return an adapter nine tenths of whose A lie in its initial subspace, and where that was drawn."""
    initial = peft_fleet().initial(task)
    assert initial is not None
    return peft_fleet().load(task, None), initial


def partly(initial: InitialA) -> InitialA:
    """Return what is known of a few of the modules."""
    return replace(initial, modules=initial.modules[:3])


def of_another_seed(initial: InitialA) -> InitialA:
    return replace(initial, seed=initial.seed + 1)


@pytest.mark.parametrize("tolerance", [0.3, 0.07, 0.01])
@pytest.mark.parametrize("task", TASKS)
def test_a_known_initial_a_makes_the_code_smaller_at_the_same_tolerance(task: int, tolerance: float) -> None:
    adapter, initial = known(task)
    plain, shorter = (
        encode_adapter(peft_codec(), adapter, {}, which, limits=Limits(tolerance=tolerance)).data
        for which in (None, initial)
    )
    assert len(shorter) < 0.9 * len(plain)


@pytest.mark.one_case
@pytest.mark.parametrize("tolerance", [0.5, 0.11, 1e-3, 1e-6])
@pytest.mark.parametrize("task", TASKS)
def test_the_tolerance_is_kept_whatever_is_known(task: int, tolerance: float) -> None:
    adapter, initial = known(task)
    for which in (initial, partly(initial), of_another_seed(initial)):
        encoded = encode_adapter(peft_codec(), adapter, {}, which, limits=Limits(tolerance=tolerance))
        assert encoded.weighted_error <= tolerance
        assert encoded.squared_error == squared_error(adapter, peft_codec().decode(encoded.data))


@pytest.mark.slow
@example(seed=0, exponent=9, tolerance=0.05, moved=0.0)
@example(seed=0, exponent=-9, tolerance=0.05, moved=1e-4)
@given(
    seed=st.integers(0, 99),
    exponent=st.integers(-9, 9),
    tolerance=st.floats(0.01, 0.9),
    moved=st.sampled_from([0.0, 1e-4, 0.3, 1.0]),
)
def test_adapters_unlike_the_fleet_keep_the_tolerance_too(
    seed: int, exponent: int, tolerance: float, moved: float
) -> None:
    adapter = peft_made(seed, rank=7, moved=moved, task=seed).adapter
    scaled = with_factors(adapter, b=10.0**exponent)
    assert (
        encode_adapter(peft_codec(), scaled, {}, initial_of(adapter), limits=Limits(tolerance=tolerance)).weighted_error
        <= tolerance
    )


def test_an_error_of_the_weights_is_kept_too() -> None:
    adapter, initial = known(0)
    assert (
        encode_adapter(peft_codec(), adapter, {}, initial, limits=Limits(max_error=math.sqrt(0.002))).squared_error
        <= 0.002
    )


def integers_of(opened: OpenCode, group: KindIntegers) -> list[Integers]:
    """Return inputs, outputs, and what lies along the initial subspace."""
    kind = group.slots.kind
    sizes = (*peft_codec().quantizer.sizes[kind], opened.state.subspace.rows(kind))
    return sides_of(group.vectors, len(group.slots.layer), sizes)


@pytest.mark.parametrize("task", TASKS)
def test_the_code_holds_where_the_initial_a_was_drawn_and_how_much_is_left_across_it(task: int) -> None:
    adapter, initial = known(task)
    opened = peft_codec().open(encode_adapter(peft_codec(), adapter, {}, initial).data)
    assert opened.head.initial == initial
    for group in opened.groups:
        # A tenth of the energy is left: 13 eighths of an octave less of length.
        assert (opened.head.shifts[group.slots.kind, :6] < -8).all()
        assert integers_of(opened, group)[2].any()


def test_without_one_the_code_holds_neither() -> None:
    opened = peft_codec().open(encode_adapter(peft_codec(), known(0)[0], {}).data)
    assert opened.head.initial is None
    assert not opened.head.shifts.any()
    assert all(opened.state.subspace.rows(group.slots.kind) == 0 for group in opened.groups)


def test_what_is_known_of_some_modules_is_used_for_them() -> None:
    adapter, initial = known(0)
    sizes = [
        len(encode_adapter(peft_codec(), adapter, {}, which, limits=Limits(tolerance=0.05)).data)
        for which in (initial, replace(initial, modules=initial.modules[:2]), None)
    ]
    assert sizes[0] < sizes[1] < sizes[2]


@pytest.mark.parametrize("task", TASKS)
def test_the_same_adapter_has_the_same_code_and_the_code_the_same_bits(task: int) -> None:
    adapter, initial = known(task)
    data = encode_adapter(peft_codec(), adapter, {}, initial).data
    assert encode_adapter(peft_codec(), adapter, {}, initial).data == data
    assert same(peft_codec().decode(data), peft_codec().decode(data))


def test_codes_that_share_an_initial_a_come_back_one_after_the_other_as_they_do_alone() -> None:
    under = peft_codec()
    adapters = [peft_made(moved=moved, task=task).adapter for task, moved in ((0, 0.2), (3, 0.8))]
    initials = [initial_of(adapter) for adapter in adapters]
    codes = [encode_adapter(under, adapter, {}, initials[0]).data for adapter in adapters]
    assert initials[0] == initials[1]
    assert under.open(codes[0]).head.shifts.tolist() != under.open(codes[1]).head.shifts.tolist()
    for data in (*codes, codes[0]):
        assert same(under.decode(data), peft_codec().decode(data))


def test_the_same_adapter_has_the_same_code_in_any_gauge() -> None:
    adapter, initial = known(0)
    codes = [
        encode_adapter(peft_codec(), side, {}, initial).data for side in (adapter, with_factors(adapter, a=0.5, b=2.0))
    ]
    assert codes[0] == codes[1]


def test_an_adapter_of_zeros_has_a_code() -> None:
    adapter, initial = known(0)
    encoded = encode_adapter(peft_codec(), with_factors(adapter, b=0.0), {}, initial)
    assert encoded.squared_error == 0.0
    assert dw_norm(peft_codec().decode(encoded.data)) == 0.0


def test_a_module_of_zeros_among_others_comes_back_as_zeros() -> None:
    adapter, initial = known(0)
    first, *rest = adapter.modules
    with_zeros = replace(adapter, modules=(LoraModule(first.name, first.a, 0 * first.b), *rest))
    encoded = encode_adapter(peft_codec(), with_zeros, {}, initial, limits=Limits(tolerance=0.05))
    decoded = peft_codec().decode(encoded.data)
    assert encoded.weighted_error <= 0.05
    assert not decoded.modules[0].b.any()


def test_what_lies_along_the_subspace_takes_no_numbers_across_it() -> None:
    adapter = peft_made(moved=0.0).adapter
    shares = []
    for which in (None, initial_of(adapter)):
        opened = peft_codec().open(encode_adapter(peft_codec(), adapter, {}, which, limits=Limits(tolerance=0.01)).data)
        shares.append(sum(float((integers_of(opened, group)[0] != 0).mean()) for group in opened.groups))
    assert shares[1] < 0.5 * shares[0]


def test_an_initial_a_that_the_generator_does_not_cover_is_refused() -> None:
    adapter, initial = known(0)
    other = InitialModule(10**6, ModuleShape("model.layers.0.lm_head", 2, 8, 8))
    with pytest.raises(GeneratorError, match="does not cover"):
        encode_adapter(peft_codec(), adapter, {}, replace(initial, modules=(*initial.modules, other)))


def test_the_initial_a_does_not_change_what_is_generated_from_vectors() -> None:
    layout = known(0)[0].layout
    made = [peft_codec().generate({}, layout, task_type=None) for _ in range(2)]
    assert same(*made)
    assert all(torch.isfinite(module.a).all() for module in made[0].modules)
