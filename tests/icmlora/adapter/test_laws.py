"""Laws that hold for every adapter: of scaling, of norms and distances, of sums, and of the canonical form."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, strategies as st

from icmlora.adapter.arithmetic import mean_adapter, plus, times, truncated, with_modules
from icmlora.adapter.canonical import canonicalize
from icmlora.adapter.layout import ModuleShape, target_modules
from icmlora.adapter.metrics import dw_norm, module_norms, squared_error
from icmlora.adapter.model import Adapter, LoraModule
from tests.icmlora.small_fleet import BASE, dense

WIDTHS = {"model.layers.0.q": (6, 5), "model.layers.1.q": (6, 5), "model.layers.0.down": (4, 9), "head": (3, 3)}


@st.composite
def adapters(draw: st.DrawFn, names: tuple[str, ...] = tuple(WIDTHS)) -> Adapter:
    """Draw an adapter of some of the modules, each with a rank and a size of its own."""
    chosen = draw(st.lists(st.sampled_from(names), min_size=1, unique=True))
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**31 - 1)))
    modules = []
    for name in chosen:
        rank, size = draw(st.integers(1, 7)), 2.0 ** draw(st.integers(-8, 8))
        inputs, outputs = WIDTHS[name]
        a, b = torch.randn(rank, inputs, generator=random), torch.randn(outputs, rank, generator=random)
        modules.append(LoraModule(name, a, size * b))
    return Adapter(BASE, "CAUSAL_LM", target_modules(chosen), tuple(modules))


FACTORS = st.floats(-4, 4).map(lambda value: round(value, 3))


def scaled(adapter: Adapter, factor: float) -> Adapter:
    return with_modules(adapter, times(adapter.modules, factor))


def squared(adapter: Adapter) -> float:
    return sum(float(dw.square().sum()) for dw in dense(adapter).values())


def dense_error(left: Adapter, right: Adapter) -> float:
    """Return the relative error by its definition, with every dW in full."""
    one, other = dense(left), dense(right)
    zero = torch.zeros((), dtype=torch.float64)
    return sum(float((one.get(name, zero) - other.get(name, zero)).square().sum()) for name in one | other) / squared(
        left
    )


@given(adapters(), adapters())
def test_the_error_of_any_two_adapters_is_that_of_their_dense_dw(left: Adapter, right: Adapter) -> None:
    assert squared_error(left, right) == pytest.approx(dense_error(left, right), rel=1e-9)


@given(adapters(), FACTORS)
def test_a_scaled_copy_has_the_error_of_its_scale(adapter: Adapter, factor: float) -> None:
    assert squared_error(adapter, scaled(adapter, factor)) == pytest.approx((1 - factor) ** 2, rel=1e-5, abs=1e-9)


@given(adapters(), adapters(), st.integers(-20, 20))
def test_the_error_does_not_depend_on_a_common_scale(left: Adapter, right: Adapter, exponent: int) -> None:
    factor = 2.0**exponent
    error = squared_error(scaled(left, factor), scaled(right, factor))
    assert error == pytest.approx(squared_error(left, right), rel=1e-12)


@given(adapters(), adapters())
def test_two_adapters_are_equally_far_from_each_other_in_both_directions(left: Adapter, right: Adapter) -> None:
    there = squared_error(left, right) * dw_norm(left) ** 2
    back = squared_error(right, left) * dw_norm(right) ** 2
    assert there == pytest.approx(back, rel=1e-9, abs=1e-9 * squared(left))


@given(adapters(), adapters(), adapters())
def test_a_detour_is_not_shorter(first: Adapter, middle: Adapter, last: Adapter) -> None:
    def distance(left: Adapter, right: Adapter) -> float:
        return math.sqrt(squared_error(left, right)) * dw_norm(left)

    assert distance(first, last) <= (distance(first, middle) + distance(middle, last)) * (1 + 1e-7)


@given(adapters())
def test_the_squared_norms_of_the_modules_add_up(adapter: Adapter) -> None:
    assert sum(norm**2 for norm in module_norms(adapter).values()) == pytest.approx(squared(adapter), rel=1e-9)
    assert dw_norm(adapter) ** 2 == pytest.approx(squared(adapter), rel=1e-9)


@given(adapters(), FACTORS)
def test_the_norm_of_a_multiple_is_the_multiple_of_the_norm(adapter: Adapter, factor: float) -> None:
    assert dw_norm(scaled(adapter, factor)) == pytest.approx(abs(factor) * dw_norm(adapter), rel=1e-5, abs=1e-12)


@given(adapters())
def test_the_canonical_form_is_its_own_canonical_form(adapter: Adapter) -> None:
    once = canonicalize(adapter)
    twice = canonicalize(once)
    assert twice.layout == once.layout == adapter.layout
    for one, two in zip(once.modules, twice.modules, strict=True):
        torch.testing.assert_close(one.a, two.a, rtol=1e-3, atol=1e-4 * float(one.a.abs().max()))
        torch.testing.assert_close(one.b, two.b, rtol=1e-3, atol=1e-4 * float(one.b.abs().max()))


@given(adapters())
def test_the_canonical_form_has_the_same_dw(adapter: Adapter) -> None:
    assert squared_error(adapter, canonicalize(adapter)) < 1e-12


@given(adapters())
def test_the_slots_of_the_canonical_form_carry_the_singular_values(adapter: Adapter) -> None:
    whole = dense(adapter)
    for module in canonicalize(adapter).modules:
        values = torch.linalg.svdvals(whole[module.name])[: module.shape.rank]
        slots = module.a.double().norm(dim=1) * module.b.double().norm(dim=0)
        torch.testing.assert_close(slots[: len(values)], values, rtol=1e-4, atol=1e-5 * float(values[0]))
        assert not slots[len(values) :].any()  # a rank above the width leaves empty slots


@given(adapters(), st.integers(-6, 6))
def test_a_scale_is_shared_by_both_factors_of_the_canonical_form(adapter: Adapter, exponent: int) -> None:
    plain, larger = canonicalize(adapter), canonicalize(scaled(adapter, 4.0**exponent))
    for module, other in zip(plain.modules, larger.modules, strict=True):
        torch.testing.assert_close(other.a.norm(), 2.0**exponent * module.a.norm(), rtol=1e-5, atol=0)
        torch.testing.assert_close(other.b.norm(), 2.0**exponent * module.b.norm(), rtol=1e-5, atol=0)


@given(adapters())
def test_a_negated_adapter_differs_in_the_signs_of_b_alone(adapter: Adapter) -> None:
    plain, negated = canonicalize(adapter), canonicalize(scaled(adapter, -1.0))
    for module, other in zip(plain.modules, negated.modules, strict=True):
        torch.testing.assert_close(other.b @ other.a, -(module.b @ module.a), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(other.b.norm(dim=0), module.b.norm(dim=0), rtol=1e-4, atol=1e-4)


@given(adapters(), adapters())
def test_a_sum_does_not_depend_on_its_order(left: Adapter, right: Adapter) -> None:
    one, other = plus(left, right.modules), plus(right, left.modules)
    for name, value in dense(one).items():
        torch.testing.assert_close(value, dense(other)[name], rtol=1e-5, atol=1e-5 * float(value.abs().max()))


@given(adapters())
def test_an_adapter_minus_itself_is_nothing(adapter: Adapter) -> None:
    nothing = plus(adapter, times(adapter.modules, -1.0))
    assert dw_norm(nothing) <= 1e-6 * dw_norm(adapter)
    assert [shape.rank for shape in nothing.layout] == [2 * shape.rank for shape in adapter.layout]


@given(adapters(), st.integers(1, 8))
def test_truncation_loses_the_energy_of_the_slots_it_drops(adapter: Adapter, rank: int) -> None:
    lost = sum(float(torch.linalg.svdvals(dw)[rank:].square().sum()) for dw in dense(adapter).values())
    error = squared_error(adapter, truncated(adapter, rank))
    assert error == pytest.approx(lost / squared(adapter), rel=1e-3, abs=1e-9)


@given(adapters())
def test_the_mean_of_copies_is_the_adapter(adapter: Adapter) -> None:
    assert squared_error(adapter, mean_adapter([adapter] * 3, 16)) < 1e-9


@given(st.lists(adapters(), min_size=2, max_size=4))
def test_the_mean_does_not_depend_on_the_order_of_the_fleet(fleet: list[Adapter]) -> None:
    mean, turned = mean_adapter(fleet, 16), mean_adapter(fleet[::-1], 16)
    assert {shape.module for shape in mean.layout} == {shape.module for shape in turned.layout}
    if dw_norm(mean) > 0:
        assert squared_error(mean, turned) < 1e-8


@given(kinds=st.sets(st.sampled_from(["q", "k", "v", "up"]), min_size=1), layers=st.integers(1, 12))
def test_modules_in_every_layer_are_named_by_their_kind(kinds: set[str], layers: int) -> None:
    names = [f"model.layers.{layer}.{kind}" for layer in range(layers) for kind in sorted(kinds)]
    assert target_modules(names) == tuple(sorted(kinds))


@given(layers=st.integers(2, 12), data=st.data())
def test_a_missing_module_makes_all_names_full(layers: int, data: st.DataObject) -> None:
    names = [f"model.layers.{layer}.{kind}" for layer in range(layers) for kind in "qv"]
    names.remove(data.draw(st.sampled_from(names)))
    assert target_modules(names) == tuple(names)


@given(st.integers(1, 64), st.integers(1, 999), st.integers(1, 999))
def test_a_module_has_as_many_parameters_as_its_two_factors(rank: int, inputs: int, outputs: int) -> None:
    module = LoraModule("q", torch.zeros(rank, inputs), torch.zeros(outputs, rank))
    assert module.shape == ModuleShape("q", rank, inputs, outputs)
    assert module.shape.parameters == module.a.numel() + module.b.numel()
