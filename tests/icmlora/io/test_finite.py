"""Finite values, found in the raw bits."""

from __future__ import annotations

import tracemalloc

import pytest
import torch
from hypothesis import given, strategies as st

from icmlora.errors import AdapterRefused
from icmlora.io.finite import check_finite, is_zero
from icmlora.io.safetensors import RawTensor, encode, read_header

TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def raw(values: torch.Tensor, dtype: str) -> RawTensor:
    narrow = values.to(TYPES[dtype])
    return RawTensor(dtype, tuple(values.shape), narrow.reshape(-1).view(torch.uint8).numpy().tobytes())


def check(**tensors: RawTensor) -> None:
    data = encode(tensors, {})
    check_finite(data, read_header(data))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("value", "name"), [("nan", "NaN"), ("inf", "Inf"), ("-inf", "-Inf")])
def test_the_first_wrong_value_is_named_with_its_position(dtype: str, value: str, name: str) -> None:
    values = torch.zeros(3, 4)
    values[1, 2] = float(value)
    values[2, 0] = float("nan")
    with pytest.raises(AdapterRefused) as caught:
        check(a=raw(torch.zeros(2), "F32"), b=raw(values, dtype))
    assert caught.value.message == f"b holds {name} at [1, 2] (2 such values in the tensor)"
    assert caught.value.kind == "non-finite"


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("value", [0.0, -0.0, 65504.0, -65504.0, 6e-8, 1e-7])
def test_zero_large_and_denormal_values_are_finite(dtype: str, value: float) -> None:
    check(a=raw(torch.full((5,), value), dtype))


def test_the_largest_values_of_bfloat16_are_finite() -> None:
    check(a=raw(torch.tensor([torch.finfo(torch.bfloat16).max, torch.finfo(torch.bfloat16).min]), "BF16"))


def test_a_wrong_value_after_the_first_chunk_is_found() -> None:
    values = torch.zeros(400_000)
    values[300_000] = float("nan")
    with pytest.raises(AdapterRefused, match=r"at \[300000\]"):
        check(a=raw(values, "BF16"))


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=20), st.sampled_from(sorted(TYPES)))
def test_any_bits_are_judged_as_torch_judges_them(words: list[int], dtype: str) -> None:
    data = b"".join(word.to_bytes(4, "little") for word in words)
    values = torch.frombuffer(bytearray(data), dtype=TYPES[dtype])
    try:
        check(a=RawTensor(dtype, (len(values),), data))
        finite = True
    except AdapterRefused:
        finite = False
    assert finite == bool(torch.isfinite(values).all())


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("place", [0, 300_000, 599_999])
def test_one_value_anywhere_makes_a_tensor_other_than_zero(dtype: str, place: int) -> None:
    values = torch.full((600, 1000), -0.0)
    zeros = encode({"a": raw(values, dtype)}, {})
    values.view(-1)[place] = 6e-8
    other = encode({"a": raw(values, dtype)}, {})
    (tensor,) = read_header(zeros).tensors
    assert is_zero(zeros, tensor)
    assert not is_zero(other, tensor)


def test_looking_for_zeros_takes_little_memory() -> None:
    data = encode({"a": raw(torch.zeros(4, 1 << 20), "F32")}, {})
    (tensor,) = read_header(data).tensors
    tracemalloc.start()
    try:
        assert is_zero(data, tensor)
        assert tracemalloc.get_traced_memory()[1] < len(data) / 4
    finally:
        tracemalloc.stop()
