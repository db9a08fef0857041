"""Adapters for MLX-LM: that they compute what PEFT computes, the configuration, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, strategies as st
from safetensors.torch import load

from icmlora.errors import AdapterRefused, DataError
from icmlora.formats.format import RunnableAdapter
from icmlora.formats.pairs.mlx import encode_mlx
from tests.icmlora import adapter_files as make

NAMES = ("model.layers.0.self_attn.q_proj", "model.layers.2.mlp.down_proj", "model.layers.10.self_attn.q_proj")


def adapter(ranks: tuple[int, ...] = (2, 4, 3), names: tuple[str, ...] = NAMES) -> RunnableAdapter:
    random = torch.Generator().manual_seed(sum(ranks))
    factors = [
        (name, torch.randn(rank, 6, generator=random), torch.randn(5, rank, generator=random))
        for name, rank in zip(names, ranks, strict=True)
    ]
    return RunnableAdapter(make.adapter(*factors))


def written(made: RunnableAdapter, **options: Any) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return the tensors and the configuration of an adapter's folder."""
    files = encode_mlx(made, metadata={}, **options)
    return load(files.weights), json.loads(files.config)


@given(ranks=st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9)))
def test_a_layer_adds_what_lora_adds(ranks: tuple[int, ...]) -> None:
    made = adapter(ranks)
    tensors, config = written(made)
    x = torch.randn(7, 6, generator=torch.Generator().manual_seed(0))
    for module in made.adapter.modules:
        a, b = tensors[f"{module.name}.lora_a"], tensors[f"{module.name}.lora_b"]
        assert (a.shape, b.shape) == ((6, max(ranks)), (max(ranks), 5))
        added = config["lora_parameters"]["scale"] * ((x @ a) @ b)  # as in mlx_lm/tuner/lora.py
        torch.testing.assert_close(added, x @ (module.b @ module.a).T, rtol=1e-5, atol=1e-5)


def test_the_configuration_says_what_mlx_lm_reads() -> None:
    _, config = written(adapter())
    assert config == {
        "fine_tune_type": "lora",
        "lora_parameters": {"dropout": 0.0, "keys": ["mlp.down_proj", "self_attn.q_proj"], "rank": 4, "scale": 1.0},
        "model": make.BASE,
        "num_layers": -1,
    }


def test_dora_keeps_its_magnitudes() -> None:
    made = adapter()
    magnitudes = {name: torch.rand(5) for name in NAMES}
    tensors, config = written(replace(made, magnitudes=magnitudes))
    assert config["fine_tune_type"] == "dora"
    assert all(torch.equal(tensors[f"{name}.m"], magnitudes[name]) for name in NAMES)


def test_there_are_no_tensors_that_mlx_lm_does_not_know() -> None:
    tensors, _ = written(adapter())
    assert tensors.keys() == {f"{name}.{leaf}" for name in NAMES for leaf in ("lora_a", "lora_b")}


@pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.model."])
def test_the_text_model_of_a_larger_model_is_where_mlx_lm_has_it(prefix: str) -> None:
    tensors, config = written(adapter((2,), (f"{prefix}layers.1.mlp.up_proj",)))
    place = "language_model.model.layers.1.mlp.up_proj"
    assert tensors.keys() == {f"{place}.lora_a", f"{place}.lora_b"}
    assert config["lora_parameters"]["keys"] == ["mlp.up_proj"]


def test_two_modules_of_one_place_are_refused() -> None:
    names = ("model.language_model.layers.1.mlp.up_proj", "language_model.model.layers.1.mlp.up_proj")
    with pytest.raises(AdapterRefused, match=r"two modules would both be language_model\.model\.layers\.1"):
        encode_mlx(adapter((2, 2), names), metadata={})


def test_the_same_adapter_gives_the_same_bytes() -> None:
    assert encode_mlx(adapter(), metadata={"b": "1", "a": "2"}) == encode_mlx(adapter(), metadata={"a": "2", "b": "1"})


@pytest.mark.parametrize(
    "name",
    [
        "lm_head",
        "model.embed_tokens",
        "model.layers.0.mlp.experts.3.gate_proj",
        "model.layers.0.mlp.experts.3",
        "model.layers.x.self_attn.q_proj",
        "transformer.h.0.attn.c_attn",
        "\x1b[2Jmodel",
    ],
)
def test_a_module_without_a_place_is_refused_by_name(name: str) -> None:
    with pytest.raises(AdapterRefused, match="an MLX adapter cannot hold this module") as error:
        encode_mlx(adapter((2, 2), (NAMES[0], name)), metadata={})
    assert error.value.kind == "layers"
    assert "\x1b" not in str(error.value)


@pytest.mark.parametrize(
    ("part", "fact"),
    [
        ({"values": {"score.weight": torch.ones(2)}}, "the whole tensor score.weight"),
        ({"rows": {"model.embed_tokens": ([1], torch.ones(1, 2))}}, "single rows of model.embed_tokens"),
        ({"biases": {NAMES[0]: torch.ones(5)}}, "biases of LoRA's B"),
    ],
)
def test_what_has_no_place_is_refused_and_never_dropped(part: dict[str, Any], fact: str) -> None:
    with pytest.raises(AdapterRefused, match=f"but this one also has {fact}"):
        encode_mlx(replace(adapter(), **part), metadata={})


@pytest.mark.parametrize(("dtype", "kind"), [("float16", torch.float16), ("bfloat16", torch.bfloat16)])
def test_a_smaller_number_format_is_rounded_to(dtype: str, kind: torch.dtype) -> None:
    exact, _ = written(adapter())
    tensors, _ = written(adapter(), dtype=dtype)
    assert all(torch.equal(tensors[name], exact[name].to(kind)) for name in exact)


def test_a_number_that_the_format_cannot_hold_is_refused() -> None:
    big = make.adapter((NAMES[0], torch.ones(1, 2), torch.full((2, 1), 1e6)))
    with pytest.raises(AdapterRefused, match="lora_b contains a value that F16 cannot represent"):
        encode_mlx(RunnableAdapter(big), metadata={}, dtype="float16")


def test_an_unknown_number_format_is_refused() -> None:
    with pytest.raises(DataError, match="unknown number format 'int4'"):
        encode_mlx(adapter(), metadata={}, dtype="int4")
