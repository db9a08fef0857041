"""Encoding and decoding of adapters under a trained generator."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given, strategies as st

from icmlora.adapter.metrics import dw_norm, squared_error
from icmlora.adapter.model import Adapter, LoraModule
from icmlora.errors import AdapterRefused, CodeError, GeneratorError
from icmlora.generator.codec import codec as codec_module
from icmlora.generator.codec.codec import Codec
from icmlora.generator.codec.encoding import encode_adapter
from icmlora.generator.codec.limits import Limits
from icmlora.generator.files.network_file import generator_to_bytes
from icmlora.training.loop import fit
from tests.icmlora.small_fleet import (
    begin,
    codec,
    make_adapter,
    make_vectors,
    mixed_fleet,
    same,
    weighted,
    with_factors,
)


@pytest.mark.one_case
@pytest.mark.parametrize("tolerance", [0.5, 0.11, 0.012, 1e-3, 1e-6])
@pytest.mark.parametrize("task", [0, 1, 2])
def test_a_code_keeps_its_tolerance_for_every_rank_and_kind(task: int, tolerance: float) -> None:
    original = mixed_fleet().load(task, None)
    encoded = encode_adapter(codec(), original, make_vectors(task), limits=Limits(tolerance=tolerance))
    decoded = codec().decode(encoded.data)
    assert encoded.weighted_error <= tolerance
    assert encoded.squared_error == squared_error(original, decoded)
    assert [module.name for module in decoded.modules] == [module.name for module in original.modules]


def test_the_generators_own_tolerance_is_the_default() -> None:
    under = codec()
    encoded = encode_adapter(under, make_adapter(0), make_vectors(0))
    assert (
        encoded.data
        == encode_adapter(under, make_adapter(0), make_vectors(0), limits=Limits(tolerance=under.config.tolerance)).data
    )
    assert encoded.weighted_error <= under.config.tolerance


@pytest.mark.slow
@example(seed=0, rank=1, exponent=9, own=1.0)
@given(seed=st.integers(0, 10**6), rank=st.integers(1, 4), exponent=st.integers(-9, 9), own=st.floats(0, 5))
def test_adapters_unlike_the_fleet_keep_the_tolerance_too(seed: int, rank: int, exponent: int, own: float) -> None:
    adapter = with_factors(make_adapter(seed, rank, own=own), b=10.0**exponent)
    assert encode_adapter(codec(), adapter, {}, limits=Limits(tolerance=0.05)).weighted_error <= 0.05


def test_one_input_that_takes_nearly_all_energy_keeps_the_tolerance() -> None:
    modules = []
    for module in make_adapter(0).modules:
        spiked = module.a.clone()
        spiked[:, 3] += 1000.0
        modules.append(LoraModule(module.name, spiked, module.b))
    adapter = Adapter("tiny/llama", None, ("q_proj", "v_proj"), tuple(modules))
    assert encode_adapter(codec(), adapter, {}, limits=Limits(max_error=math.sqrt(0.001))).squared_error <= 0.001


def test_a_smaller_tolerance_takes_more_bytes() -> None:
    sizes = [
        len(encode_adapter(codec(), make_adapter(1, rank=4), {}, limits=Limits(tolerance=tolerance)).data)
        for tolerance in (0.3, 0.03, 0.003)
    ]
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[-1]


@pytest.mark.slow
@given(seed=st.integers(0, 10**6), rank=st.integers(1, 4), sizes=st.tuples(*[st.integers(150, 2000)] * 2))
def test_more_bytes_never_make_a_worse_code(seed: int, rank: int, sizes: tuple[int, int]) -> None:
    adapter = make_adapter(seed, rank)
    less, more = (encode_adapter(codec(), adapter, {}, limits=Limits(size=size)) for size in sorted(sizes))
    assert len(more.data) <= max(sizes)
    assert more.weighted_error <= less.weighted_error or len(less.data) > min(sizes)


def test_a_code_of_a_size_is_about_as_good_as_the_one_of_its_error() -> None:
    original = make_adapter(1, rank=4)
    of_error = encode_adapter(codec(), original, {}, limits=Limits(tolerance=0.02))
    of_size = encode_adapter(codec(), original, {}, limits=Limits(size=len(of_error.data)))
    assert len(of_size.data) <= len(of_error.data)
    assert of_size.weighted_error == pytest.approx(of_error.weighted_error, rel=0.2)
    assert of_size.squared_error == squared_error(original, codec().decode(of_size.data))


def test_where_no_code_is_small_enough_the_smallest_is_returned() -> None:
    smallest = encode_adapter(codec(), make_adapter(1, rank=4), {}, limits=Limits(size=1))
    assert (
        1
        < len(smallest.data)
        <= len(encode_adapter(codec(), make_adapter(1, rank=4), {}, limits=Limits(tolerance=0.9)).data)
    )


def test_a_tolerance_that_float32_cannot_keep_is_refused() -> None:
    with pytest.raises(GeneratorError, match="1e-08"):
        encode_adapter(codec(), make_adapter(0), {}, limits=Limits(tolerance=1e-16))


def test_the_same_adapter_has_the_same_code_in_any_gauge() -> None:
    adapter = make_adapter(0)
    assert encode_adapter(codec(), adapter, {}).data == encode_adapter(codec(), adapter, {}).data
    assert (
        encode_adapter(codec(), with_factors(adapter, a=0.5, b=2.0), {}).data
        == encode_adapter(codec(), adapter, {}).data
    )


def test_a_code_decodes_to_the_same_bits_every_time() -> None:
    data = encode_adapter(codec(), make_adapter(0), make_vectors(0)).data
    assert same(codec().decode(data), codec().decode(data))


def test_a_code_is_far_smaller_than_its_adapter() -> None:
    adapter = make_adapter(1, rank=4)
    plain = 2 * sum(shape.parameters for shape in adapter.layout)
    assert len(encode_adapter(codec(), adapter, make_vectors(1)).data) < plain / 2


def test_an_adapter_of_zeros_has_a_code() -> None:
    zeros = with_factors(make_adapter(0), b=0.0)
    encoded = encode_adapter(codec(), zeros, make_vectors(0))
    assert encoded.squared_error == 0.0
    assert dw_norm(codec().decode(encoded.data)) == 0.0


def test_a_module_of_zeros_among_others_comes_back_as_zeros() -> None:
    first, *rest = make_adapter(0).modules
    modules = (LoraModule(first.name, first.a, 0 * first.b), *rest)
    adapter = Adapter("tiny/llama", "CAUSAL_LM", ("q_proj", "v_proj"), modules)
    decoded = codec().decode(encode_adapter(codec(), adapter, {}).data)
    assert len(decoded.modules) == len(modules)
    assert not decoded.modules[0].b.any()


def test_an_adapter_without_task_type_or_with_a_strange_one_comes_back_so() -> None:
    for task_type in (None, "SEQ_2_SEQ_LM", "Ünïcode " * 120):
        plain = make_adapter(0)
        adapter = Adapter(plain.base_model, task_type, plain.target_modules, plain.modules)
        assert codec().decode(encode_adapter(codec(), adapter, {}).data).task_type == task_type


@pytest.mark.slow
def test_a_generator_trained_without_vectors_encodes_with_and_without_them() -> None:
    under = codec(sets=0)
    assert under.config.condition_size == 0
    assert (
        encode_adapter(under, make_adapter(0), {}).data == encode_adapter(under, make_adapter(0), make_vectors(0)).data
    )


def test_an_adapter_that_the_generator_does_not_cover_is_refused() -> None:
    with pytest.raises(GeneratorError, match="does not cover"):
        encode_adapter(codec(), make_adapter(0, rank=8), {})


def test_an_adapter_too_large_for_float32_is_refused_and_a_large_one_is_not() -> None:
    with pytest.raises(AdapterRefused, match="too large"):
        encode_adapter(codec(), with_factors(make_adapter(0), a=1e20), make_vectors(0))
    large = with_factors(make_adapter(0), a=1e14)
    encoded = encode_adapter(codec(), large, make_vectors(0))
    assert encoded.weighted_error <= codec().config.tolerance


def test_a_task_vector_of_another_length_is_refused() -> None:
    with pytest.raises(GeneratorError, match="has 7 values"):
        encode_adapter(codec(), make_adapter(0), {"adapted": torch.zeros(7)})


def test_the_code_of_another_generator_is_refused_by_name() -> None:
    other = Codec.of(generator_to_bytes(codec().net, {"seed": "1"}))
    data = encode_adapter(other, make_adapter(0), {}).data
    with pytest.raises(CodeError, match=other.digest[:12]):
        codec().decode(data)


def test_encoding_does_not_change_the_generator() -> None:
    under = codec()
    before = {name: tensor.clone() for name, tensor in under.net.state_dict().items()}
    encode_adapter(under, make_adapter(0), make_vectors(0))
    assert all(torch.equal(before[name], tensor) for name, tensor in under.net.state_dict().items())


@pytest.mark.slow
def test_training_longer_on_adapters_that_can_be_predicted_makes_their_codes_smaller() -> None:
    fleet = mixed_fleet()
    state = begin(fleet, 120)
    for _ in fit(state, fleet):
        pass
    longer = Codec.of(generator_to_bytes(state.net))
    sizes = [
        sum(len(encode_adapter(under, fleet.load(task, None), make_vectors(task)).data) for task in range(3))
        for under in (codec(), longer)
    ]
    assert sizes[1] < 0.9 * sizes[0]


@pytest.mark.parametrize("task", [0, 1, 2])
def test_a_decoded_adapter_is_as_strong_along_the_original_as_the_original_is(task: int) -> None:
    under = codec()
    sides = (
        mixed_fleet().load(task, None),
        under.decode(encode_adapter(under, mixed_fleet().load(task, None), {}, limits=Limits(tolerance=0.25)).data),
    )
    original, decoded = (weighted(side, under.config, under.net.sensitivity) for side in sides)
    along = (dw_norm(original) ** 2 + dw_norm(decoded) ** 2) / 2 - squared_error(original, decoded) * (
        dw_norm(original) ** 2 / 2
    )
    assert along / dw_norm(original) ** 2 == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize("task", [0, 1, 2])
def test_what_the_generator_predicts_has_a_code_without_integers(task: int) -> None:
    under = codec()
    predicted = under.generate(make_vectors(task), mixed_fleet().load(task, None).layout, task_type=None)
    encoded = encode_adapter(under, predicted, make_vectors(task), limits=Limits(tolerance=0.95))
    groups = under.open(encoded.data).groups
    assert not any(group.vectors.values.any() for group in groups)
    assert sum(len(group.slots.layer) for group in groups) > 0
    assert encoded.weighted_error < 0.5


@pytest.mark.parametrize("task", [0, 1, 2])
def test_the_number_of_threads_changes_no_byte_of_a_code_and_no_bit_of_what_it_decodes_to(task: int) -> None:
    before, made = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            data = encode_adapter(codec(), mixed_fleet().load(task, None), make_vectors(task)).data
            made.append((data, codec().decode(data)))
    finally:
        torch.set_num_threads(before)
    assert made[0][0] == made[1][0]
    assert same(made[0][1], made[1][1])


def test_a_code_that_is_read_ahead_decodes_to_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    under = codec()
    data = encode_adapter(under, mixed_fleet().load(0, None), make_vectors(0)).data
    plain = under.decode(data)
    monkeypatch.setattr(codec_module, "_LARGE", 0)
    assert same(under.decode(data), plain)
