"""What `icm ingest` checks of every adapter, without torch."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

from icmlora.adapter.layout import ModuleShape
from icmlora.errors import AdapterRefused, UnsafeInput
from icmlora.formats.peft import PEFT
from tests.icmlora.adapter_files import BASE, INPUTS, OUTPUTS, Q0, V0, config, factors, key, weights

ONE = torch.ones(2, INPUTS)


def refusal(tensors: dict[str, torch.Tensor], **fields: object) -> AdapterRefused:
    with pytest.raises(AdapterRefused) as caught:
        PEFT.inspect(config(**fields), weights(tensors), path="adapter")
    assert caught.value.path == "adapter"
    return caught.value


def test_the_summary_says_what_the_adapter_is() -> None:
    summary = PEFT.inspect(config(revision="abc"), weights(dtype="bfloat16"))
    assert (summary.base_model, summary.revision, summary.task_type) == (BASE, "abc", "CAUSAL_LM")
    assert (summary.dtype, summary.rank_max, summary.parameters) == ("BF16", 2, 2 * 2 * (INPUTS + OUTPUTS))
    assert summary.target_modules == ("q_proj", "v_proj")
    assert summary.layout == (ModuleShape(Q0, 2, INPUTS, OUTPUTS), ModuleShape(V0, 2, INPUTS, OUTPUTS))


def test_a_memoryview_is_inspected_in_place() -> None:
    assert PEFT.inspect(config(), memoryview(weights())).rank_max == 2


def test_a_summary_keeps_nothing_of_the_memory_that_was_inspected() -> None:
    memory = bytearray(weights())
    with memoryview(memory) as view:
        summary = PEFT.inspect(config(), view)
    memory.clear()  # bytes that somebody still looks at cannot be cleared
    assert summary == PEFT.inspect(config(), weights())


def test_modules_come_in_natural_order() -> None:
    names = tuple(f"model.layers.{layer}.mlp.up_proj" for layer in range(11))
    summary = PEFT.inspect(config(), weights(factors(names)))
    assert tuple(shape.module for shape in summary.layout) == names


def test_ranks_by_pattern_are_accepted() -> None:
    tensors = factors((Q0,), rank=3) | factors((V0,), rank=2)
    assert PEFT.inspect(config(rank_pattern={"q_proj": 3}), weights(tensors)).rank_max == 3


@pytest.mark.parametrize("rank", [1, 2, 256])
def test_small_and_large_ranks_are_accepted(rank: int) -> None:
    assert PEFT.inspect(config(r=rank), weights(factors(rank=rank))).rank_max == rank


@pytest.mark.parametrize(
    "name",
    [
        f"base_model.model.{Q0}.lora_A.default.weight",
        f"base_model.model._orig_mod.{Q0}.lora_A.weight",
        f"base_model.model.module.{Q0}.lora_A.weight",
        f"module.base_model.model.{Q0}.lora_A.weight",
        "base_model.model.model.layers.0._checkpoint_wrapped_module.self_attn.q_proj.lora_A.weight",
        "base_model.model.model.layers.0._fsdp_wrapped_module.self_attn.q_proj.lora_A.weight",
    ],
)
def test_wrappers_and_the_name_default_are_removed_from_keys(name: str) -> None:
    tensors = {name: ONE, key(Q0, "B"): torch.ones(OUTPUTS, 2)}
    assert PEFT.inspect(config(), weights(tensors)).layout[0].module == Q0


TENSORS = [
    (key(Q0, "A").replace("weight", "bias"), "bias"),
    (f"base_model.model.{Q0}.lora_magnitude_vector", "dora"),
    (f"base_model.model.{Q0}.lora_magnitude_vector.default.weight", "dora"),
    (f"base_model.model.{Q0}.lora_B.bias", "bias"),
    (f"base_model.model.{Q0}.base_layer.bias", "bias"),
    (f"base_model.model.{Q0}.base_layer.weight", "whole-layers"),
    ("base_model.model.lm_head.weight", "whole-layers"),
    ("base_model.model.model.embed_tokens.lora_embedding_A", "embedding"),
    ("base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta", "tokens"),
    (f"base_model.model.{Q0}.lora_diag", "kasa"),
    (f"base_model.model.{Q0}.lora_monteclora_sampler.expert_weights", "monteclora"),
    (f"base_model.model.{Q0}.lora_velora_embed", "velora"),
    (f"base_model.model.{Q0}.lora_E", "peft-method"),
    ("base_model.model.model.layers.0.mlp.experts.lora_A.weight", "fused-experts"),
    ("base_model.model.model.layers.0.mlp.experts.base_layer.lora_A.weight", "fused-experts"),
    ("base_model.model.attn.base_layer.out_proj.lora_A.weight", "nested"),
    ("lora_unet_down_blocks_0.lora_down.weight", "kohya"),
    ("model.layers.0.self_attn.q_proj.lora_a", "mlx"),
    ("lora_unet_x.hada_w1_a", "lycoris"),
    ("model.layers.0.self_attn.q_proj.lora_A.weight", "prefix"),
    ("base_model.model..lora_A.weight", "unknown-tensor"),
    ("something", "unknown-tensor"),
]


@pytest.mark.parametrize(("name", "kind"), TENSORS)
def test_a_tensor_that_is_no_factor_is_refused_by_name(name: str, kind: str) -> None:
    error = refusal({**factors(), name: ONE})
    assert error.kind == kind
    assert name in error.message


@pytest.mark.parametrize("half", ["A", "B"])
def test_a_factor_without_its_other_half_is_refused(half: str) -> None:
    tensors = factors()
    del tensors[key(V0, half)]
    error = refusal(tensors)
    assert error.kind == "missing-half"
    assert V0 in error.message


def test_the_same_factor_under_two_names_is_refused() -> None:
    error = refusal({**factors(), f"base_model.model.{Q0}.lora_A.default.weight": ONE})
    assert error.kind == "duplicate-key"


def test_transposed_factors_are_refused() -> None:
    error = refusal({name: tensor.T for name, tensor in factors().items()})
    assert error.kind == "shape"


def test_a_rank_other_than_the_configurations_is_refused() -> None:
    error = refusal(factors(rank=3))
    assert error.kind == "rank"
    assert "rank 3 but adapter_config.json says 2" in error.message


@pytest.mark.parametrize(("shape", "kind"), [((12,), "shape"), ((2, 6, 1), "conv"), ((2, 6, 1, 1), "conv")])
def test_factors_that_are_no_matrices_are_refused(shape: tuple[int, ...], kind: str) -> None:
    assert refusal({**factors(), key(Q0, "A"): torch.ones(shape)}).kind == kind


def test_nan_is_refused_with_tensor_and_position() -> None:
    tensors = factors()
    tensors[key(V0, "B")][3, 1] = float("nan")
    error = refusal(tensors)
    assert error.kind == "non-finite"
    assert f"{key(V0, 'B')} holds NaN at [3, 1]" in error.message


def test_nan_is_found_in_a_file_whose_header_was_met_before() -> None:
    PEFT.inspect(config(), weights())
    tensors = factors()
    tensors[key(Q0, "A")][0, 0] = float("inf")
    assert refusal(tensors).kind == "non-finite"


def test_a_pickle_is_unsafe() -> None:
    with pytest.raises(UnsafeInput, match="pickle"):
        PEFT.inspect(config(), b"PK\x03\x04" + b"\0" * 100)


def test_mixed_types_are_named_together() -> None:
    tensors = factors()
    tensors[key(V0, "A")] = tensors[key(V0, "A")].half()
    assert PEFT.inspect(config(), save(tensors)).dtype == "F16+F32"


@given(position=st.integers(0, 2000), value=st.integers(0, 255), where=st.sampled_from(["config", "weights"]))
def test_a_mutated_adapter_is_inspected_or_refused(position: int, value: int, where: str) -> None:
    files = {"config": bytearray(config()), "weights": bytearray(weights())}
    files[where][position % len(files[where])] = value
    try:
        summary = PEFT.inspect(bytes(files["config"]), files["weights"])
    except AdapterRefused as error:
        refused = error
    else:
        assert len(summary.layout) == 2
        return
    assert refused.message.isprintable()


def test_discovery_and_the_formats_do_not_import_torch() -> None:
    code = "import sys, icmlora.formats.discovery, icmlora.formats.catalogue; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
