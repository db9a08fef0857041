"""Tokens: the same dW in another form."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, strategies as st

from icmlora.adapter.metrics import dw_norm, squared_error
from icmlora.adapter.model import Adapter, LoraModule
from icmlora.errors import AdapterRefused, GeneratorError
from icmlora.generator.config import GeneratorConfig, config_for
from icmlora.generator.network.tokenizing import tokenize
from icmlora.generator.network.tokens import (
    KindTokens,
    detokenize,
    refuse_overflow,
    refuse_underflow,
    slot_errors,
    squared_norm,
)
from tests.icmlora.small_fleet import BASE, make_adapter, uneven, weighted, with_factors


def config_of(adapter: Adapter) -> GeneratorConfig:
    return config_for(BASE, [adapter.layout], tasks=64, condition_size=0, quality=5)


def back(tokens: tuple[KindTokens, ...], adapter: Adapter) -> Adapter:
    config = config_of(adapter)
    places = [config.place_of(shape) for shape in adapter.layout]
    return detokenize(tokens, config, uneven(config), modules=places, task_type=adapter.task_type)


def tokens_of(adapter: Adapter, config: GeneratorConfig | None = None) -> tuple[KindTokens, ...]:
    config = config or config_of(adapter)
    return tokenize(adapter, config, uneven(config))


@given(
    seed=st.integers(0, 10**6),
    rank=st.integers(1, 8),
    exponent=st.integers(-6, 6),
    layers=st.sets(st.sampled_from([0, 1]), min_size=1),
)
def test_dw_is_unchanged_by_tokens(seed: int, rank: int, exponent: int, layers: set[int]) -> None:
    adapter = with_factors(make_adapter(seed, rank, layers=sorted(layers)), b=10.0**exponent)
    assert squared_error(adapter, back(tokens_of(adapter), adapter)) < 1e-11


def test_names_task_type_and_targets_come_back() -> None:
    adapter = make_adapter(0)
    decoded = back(tokens_of(adapter), adapter)
    assert decoded.layout == adapter.layout
    assert (decoded.task_type, decoded.target_modules) == (adapter.task_type, adapter.target_modules)


def test_both_vectors_of_a_token_carry_its_singular_value() -> None:
    adapter = make_adapter(0, rank=4)
    for group in tokens_of(adapter):
        torch.testing.assert_close(group.inputs.norm(dim=1), group.norm)
        torch.testing.assert_close(group.outputs.norm(dim=1), group.norm)


def test_tokens_are_ordered_by_layer_and_slot() -> None:
    adapter = make_adapter(0, rank=3)
    for group in tokens_of(adapter):
        assert (group.layer.tolist(), group.slot.tolist()) == ([0, 0, 0, 1, 1, 1], [0, 1, 2, 0, 1, 2])


def test_the_tokens_norms_are_those_of_the_weighted_dw() -> None:
    adapter = make_adapter(0, rank=4)
    config = config_of(adapter)
    length = dw_norm(weighted(adapter, config, uneven(config)))
    assert squared_norm(tokens_of(adapter)) == pytest.approx(length**2, rel=1e-5)


def test_slots_without_energy_have_no_token() -> None:
    adapter = make_adapter(0, rank=3)
    flat = [LoraModule(m.name, m.a[:1].expand(3, -1).contiguous(), m.b) for m in adapter.modules]
    tokens = tokens_of(Adapter(BASE, None, adapter.target_modules, tuple(flat)), config_of(adapter))
    assert all(group.slot.tolist() == [0, 0] for group in tokens)


def test_an_adapter_of_zeros_has_no_tokens_and_comes_back_as_zeros() -> None:
    adapter = with_factors(make_adapter(0), b=0.0)
    tokens = tokens_of(adapter)
    decoded = back(tokens, adapter)
    assert tokens == ()
    assert [module.name for module in decoded.modules] == [module.name for module in adapter.modules]
    assert dw_norm(decoded) == 0.0


def test_an_adapter_that_the_generator_does_not_cover_is_refused_by_name() -> None:
    with pytest.raises(GeneratorError, match=r"layers\.1\.self_attn\.q_proj with rank 2"):
        tokens_of(make_adapter(0, layers=(1,)), config_of(make_adapter(0, layers=(0,))))


@pytest.mark.parametrize(("a", "b"), [(1e20, 1.0), (1.0, 1e20), (1e30, 1e30)])
def test_an_adapter_too_large_for_float32_is_refused_by_name(a: float, b: float) -> None:
    with pytest.raises(AdapterRefused, match=r"layers\.[01]\.self_attn\.q_proj has the norm .*, too large") as caught:
        refuse_overflow(tokens_of(with_factors(make_adapter(0), a, b)), config_of(make_adapter(0)))
    assert (caught.value.kind, caught.value.hint is None) == ("overflow", False)


@pytest.mark.parametrize(("size", "is_refused"), [(1e-15, False), (1e-25, True)])
def test_an_adapter_is_refused_only_below_the_smallest_step(size: float, is_refused: bool) -> None:
    tokens = tokens_of(with_factors(make_adapter(0), 1.0, size))
    with pytest.raises(GeneratorError, match="too small to encode") if is_refused else nullcontext():
        refuse_underflow(tokens)


def test_slot_errors_are_the_distances_of_the_rank_one_parts() -> None:
    adapters = make_adapter(0, rank=3), make_adapter(1, rank=3)
    left, right = (tokens_of(adapter)[0] for adapter in adapters)
    parts = [torch.einsum("ni,no,n->nio", part.inputs, part.outputs, 1 / part.norm) for part in (left, right)]
    torch.testing.assert_close(slot_errors(left, right), (parts[0] - parts[1]).square().sum((1, 2)))
