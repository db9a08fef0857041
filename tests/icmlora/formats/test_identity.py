"""Which files hold the same tensors, and which configurations mean the same."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import given, strategies as st
from safetensors.torch import save

from icmlora.formats.tensor_hash import plain_config, tensors_digest, tensors_key
from icmlora.io.safetensors import RawTensor, encode, raw_tensors, read_header
from tests.icmlora.adapter_files import config, factors, tensor_file, weights

both = pytest.mark.parametrize("of", [tensors_key, tensors_digest])


@both
@given(metadata=st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=3))
def test_the_rest_of_the_header_does_not_count(of: Any, metadata: dict[str, str]) -> None:
    plain = weights()
    tensors = raw_tensors(plain, read_header(plain).tensors)
    assert of(encode(tensors, metadata)) == of(plain)


@both
def test_the_order_of_the_tensors_does_not_count(of: Any) -> None:
    small, large = RawTensor("F32", (1,), b"abcd"), RawTensor("F32", (2,), b"efghijkl")
    entries = {
        "x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
        "y": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]},
    }
    turned = {
        "y": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
        "x": {"dtype": "F32", "shape": [1], "data_offsets": [8, 12]},
    }
    files = [tensor_file(entries, small.data + large.data), tensor_file(turned, large.data + small.data)]
    assert of(files[0]) == of(files[1])


@both
@pytest.mark.parametrize("change", ["value", "name", "dtype", "shape"])
def test_names_types_shapes_and_values_count(of: Any, change: str) -> None:
    tensors = {"x": torch.arange(4, dtype=torch.float16), "y": torch.ones(2, dtype=torch.float16)}
    changed = {
        "value": {**tensors, "y": torch.full((2,), 2.0, dtype=torch.float16)},
        "name": {"x": tensors["x"], "z": tensors["y"]},
        "dtype": {"x": tensors["x"].view(torch.bfloat16), "y": tensors["y"]},
        "shape": {"x": tensors["x"].view(2, 2), "y": tensors["y"]},
    }[change]
    assert of(save(tensors)) != of(save(changed))


def test_the_digest_sees_a_value_that_the_key_does_not() -> None:
    one, other = factors(), factors()
    name = next(iter(other))
    other[name] = torch.cat([other[name], torch.zeros(50, other[name].shape[1])])
    one[name] = other[name].clone()
    one[name][-1, -1] = 1.0
    assert tensors_key(weights(one)) == tensors_key(weights(other))
    assert tensors_digest(weights(one)) != tensors_digest(weights(other))


@both
@given(data=st.binary(max_size=80))
def test_any_bytes_have_an_identity(of: Any, data: bytes) -> None:
    assert of(data) == of(bytes(data))


def test_what_trainers_note_does_not_count() -> None:
    noted = config(peft_version="1", lora_dropout=0.5, target_modules=["q"], base_model_name_or_path="x", revision="y")
    assert plain_config(noted) == plain_config(config())


@pytest.mark.parametrize("empty", [None, False, [], {}])
def test_an_empty_field_is_like_none(empty: object) -> None:
    assert plain_config(config(rank_pattern=empty)) == plain_config(config())


@pytest.mark.parametrize(
    "fields", [{"lora_alpha": 3}, {"use_rslora": True}, {"alpha_pattern": {"q_proj": 3}}, {"unheard_of": 0}]
)
def test_a_field_that_may_change_the_meaning_counts(fields: dict[str, Any]) -> None:
    assert plain_config(config(**fields)) != plain_config(config())


@pytest.mark.parametrize("data", [b"", b"\xff", b"[" * 100_000, b'{"a": 1, "a": 2}', json.dumps([1]).encode()])
def test_a_configuration_that_is_no_object_stands_for_itself(data: bytes) -> None:
    assert plain_config(data) == plain_config(bytes(data))
    assert plain_config(data) != plain_config(data + b" ")
