"""What `icm ingest` checks of every adapter, without torch."""

from __future__ import annotations

import subprocess
import sys
from math import prod

import pytest
import torch
from hypothesis import given, strategies as st
from safetensors.torch import save

from icmlora.adapter.layout import ModuleShape
from icmlora.errors import AdapterRefused, UnsafeInput
from icmlora.formats.peft.peft import PEFT
from icmlora.io.safetensors import RawTensor
from tests.icmlora.adapter_files import BASE, INPUTS, OUTPUTS, Q0, V0, config, factors, key, tensor_file, weights

ONE = torch.ones(2, INPUTS)


def reason(tensors: dict[str, torch.Tensor], **fields: object) -> str:
    """Inspect an adapter that there can be no code of, and return why."""
    files = config(**fields), weights(tensors)
    summary = PEFT.inspect(*files, path="adapter")
    assert summary.original_only is not None
    assert (summary.layout, summary.extras, summary.template) == ((), (), "")
    with pytest.raises(AdapterRefused, match="only its original can be used") as caught:
        PEFT.read(*files, path="adapter")
    assert (caught.value.kind, caught.value.path) == ("original-only", "adapter")
    return summary.original_only


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
def test_wrappers_and_the_name_of_the_adapter_are_removed_from_keys(name: str) -> None:
    tensors = {name: ONE, key(Q0, "B"): torch.ones(OUTPUTS, 2)}
    assert PEFT.inspect(config(), weights(tensors)).layout[0].module == Q0


def test_several_adapters_in_one_file_are_kept_as_they_are() -> None:
    names = [name.replace(".weight", ".fr.weight" if "q_proj" in name else ".en.weight") for name in factors()]
    summary = PEFT.inspect(config(), weights(dict(zip(names, factors().values(), strict=True))))
    assert summary.original_only == "it holds several adapters: en, fr"


# Tensors in addition to the LoRA factors, which are kept exactly.
EXTRAS = [
    key(Q0, "A").replace("weight", "bias"),
    f"base_model.model.{Q0}.lora_magnitude_vector",
    f"base_model.model.{Q0}.lora_magnitude_vector.default.weight",
    f"base_model.model.{Q0}.lora_B.bias",
    f"base_model.model.{Q0}.base_layer.bias",
    f"base_model.model.{Q0}.base_layer.weight",
    "base_model.model.lm_head.weight",
    "base_model.model.score.modules_to_save.default.weight",
    "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta",
    "something",
]


@pytest.mark.parametrize("name", EXTRAS)
def test_a_tensor_that_is_not_a_factor_is_an_extra(name: str) -> None:
    data = weights({**factors(), name: ONE})
    summary, loaded = PEFT.inspect(config(), data), PEFT.read(config(), data)
    assert summary.original_only is None
    assert [(extra.name, extra.dtype, extra.shape) for extra in summary.extras] == [(name, "F32", (2, INPUTS))]
    assert loaded.extras == {name: RawTensor("F32", (2, INPUTS), ONE.numpy().tobytes())}
    assert len(loaded.adapter.modules) == 2


def test_extras_of_any_type_and_shape_are_kept() -> None:
    tensors = {"ids": torch.arange(5), "mask": torch.tensor(True), "none": torch.zeros(0, 3), "half": ONE.half()}
    data = save({**factors(), **tensors}, {"format": "pt"})
    found = {extra.name: (extra.dtype, extra.shape) for extra in PEFT.inspect(config(), data).extras}
    assert found == {"ids": ("I64", (5,)), "mask": ("BOOL", ()), "none": ("F32", (0, 3)), "half": ("F16", (2, INPUTS))}
    assert PEFT.read(config(), data).extras["ids"].data == torch.arange(5).numpy().tobytes()


# Tensors of other methods: what they mean without them, nobody can say.
OTHER_METHODS = [
    (f"base_model.model.{Q0}.lora_diag", "KaSA"),
    (f"base_model.model.{Q0}.lora_monteclora_sampler.expert_weights", "MonteCLoRA"),
    (f"base_model.model.{Q0}.lora_velora_embed", "VeLoRA"),
    (f"base_model.model.{Q0}.lora_E", "AdaLoRA"),
    (f"base_model.model.{Q0}.lora_new_thing", "does not support"),
    ("base_model.model.model.embed_tokens.lora_embedding_A", "has no lora_B"),
    ("base_model.model.model.layers.0.mlp.experts.lora_A.weight", "has no lora_B"),
    ("lora_unet_down_blocks_0.lora_down.weight", "kohya"),
    ("model.layers.0.self_attn.q_proj.lora_a", "MLX"),
    ("lora_unet_x.hada_w1_a", "LyCORIS"),
    ("model.layers.0.self_attn.q_proj.lora_A.weight", "are the same factor"),
    ("base_model.model..lora_A.weight", "does not name a module"),
]


@pytest.mark.parametrize(("name", "why"), OTHER_METHODS)
def test_a_tensor_of_another_method_leaves_the_original_only_and_is_named(name: str, why: str) -> None:
    found = reason({**factors(), name: ONE})
    assert name in found
    assert why in found


@pytest.mark.parametrize("half", ["A", "B"])
def test_a_factor_without_its_other_half_leaves_the_original_only(half: str) -> None:
    tensors = factors()
    del tensors[key(V0, half)]
    assert f"has no lora_{half}" in reason(tensors)


def test_the_same_factor_under_two_names_leaves_the_original_only() -> None:
    assert "are the same factor" in reason({**factors(), f"base_model.model.{Q0}.lora_A.default.weight": ONE})


def test_transposed_factors_leave_the_original_only() -> None:
    assert "do not fit together" in reason({name: tensor.T for name, tensor in factors().items()})


def test_a_rank_other_than_the_configurations_leaves_the_original_only() -> None:
    assert "rank 3, but adapter_config.json states 2" in reason(factors(rank=3))


@pytest.mark.parametrize("shape", [(12,), (), (0, INPUTS)])
def test_factors_without_rows_and_columns_leave_the_original_only(shape: tuple[int, ...]) -> None:
    assert "has the invalid shape" in reason({**factors(), key(Q0, "A"): torch.ones(shape)})


@pytest.mark.parametrize("kernel", [(3,), (3, 3), (2, 3, 4)])
def test_a_convolution_is_a_module_whose_kernel_counts_as_input(kernel: tuple[int, ...]) -> None:
    ones = (1,) * len(kernel)
    tensors = {key(Q0, "A"): torch.ones(2, 4, *kernel), key(Q0, "B"): torch.ones(OUTPUTS, 2, *ones)}
    data = weights(tensors)
    assert PEFT.inspect(config(), data).layout == (ModuleShape(Q0, 2, 4 * prod(kernel), OUTPUTS),)
    (module,) = PEFT.read(config(), data).adapter.modules
    assert (module.a.shape, module.b.shape) == ((2, 4 * prod(kernel)), (OUTPUTS, 2))


def test_a_grouped_convolution_has_a_module_for_each_group() -> None:
    tensors = {key(Q0, "A"): torch.ones(8, 4, 3, 3), key(Q0, "B"): torch.ones(12, 2, 1, 1)}
    layout = PEFT.inspect(config(r=8), weights(tensors)).layout
    assert layout == tuple(ModuleShape(f"{Q0}.{group}", 2, 36, 3) for group in range(4))


@pytest.mark.parametrize(("rows", "outputs", "why"), [(8, 5, "do not fit together"), (1024, 1024, "1,024 groups")])
def test_groups_without_outputs_of_their_own_or_too_many_leave_the_original_only(
    rows: int, outputs: int, why: str
) -> None:
    columns = 2 if rows == 8 else 1
    tensors = {key(Q0, "A"): torch.ones(rows, 1, 3), key(Q0, "B"): torch.ones(outputs, columns, 1)}
    assert why in reason(tensors, r=rows)


def test_an_embedding_is_a_module_whose_rows_are_its_input() -> None:
    names = [f"base_model.model.model.embed_tokens.lora_embedding_{half}" for half in "AB"]
    tensors = dict(zip(names, (torch.ones(2, 100), torch.ones(OUTPUTS, 2)), strict=True))
    summary = PEFT.inspect(config(), weights({**factors(), **tensors}))
    assert summary.layout[0] == ModuleShape("model.embed_tokens", 2, 100, OUTPUTS)
    assert summary.target_modules == ("model.embed_tokens", Q0, V0)


def test_a_file_without_factors_leaves_the_original_only() -> None:
    assert reason({"base_model.model.score.weight": ONE}) == "has no LoRA factors"


def test_an_empty_file_does_nothing() -> None:
    summary = PEFT.inspect(config(), tensor_file({}))
    assert (summary.does_nothing, summary.original_only) == (True, "does nothing: it holds no tensors")


def test_factors_of_a_type_without_arithmetic_leave_the_original_only() -> None:
    eights = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in factors().items()}
    summary = PEFT.inspect(config(), save(eights, {"format": "pt"}))
    assert (summary.dtype, summary.original_only) == ("F8_E4M3", f"{key(Q0, 'A')} has the unsupported type F8_E4M3")


def test_nan_leaves_the_original_only_with_tensor_and_position() -> None:
    tensors = factors()
    tensors[key(V0, "B")][3, 1] = float("nan")
    assert f"{key(V0, 'B')} holds NaN at [3, 1]" in reason(tensors)
    assert PEFT.inspect(config(), weights(tensors)).does_nothing


def test_nan_is_found_in_a_file_whose_header_was_met_before() -> None:
    assert PEFT.inspect(config(), weights()).original_only is None
    tensors = factors()
    tensors[key(Q0, "A")][0, 0] = float("inf")
    assert "Inf at [0, 0]" in reason(tensors)
    assert PEFT.inspect(config(), weights()).original_only is None


@pytest.mark.parametrize("half", ["A", "B"])
@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_an_adapter_whose_factors_are_zero_does_nothing(half: str, zero: float) -> None:
    dead = {name: tensor * 0 + zero if f"lora_{half}" in name else tensor for name, tensor in factors().items()}
    assert reason(dead) == "does nothing: B @ A is zero in every module"
    assert PEFT.inspect(config(), weights(dead)).does_nothing


def test_an_adapter_of_scale_zero_does_nothing() -> None:
    assert reason(factors(), lora_alpha=0).startswith("does nothing")


def test_one_module_that_is_not_zero_is_enough_for_a_code() -> None:
    tensors = factors()
    tensors[key(Q0, "B")].zero_()
    summary = PEFT.inspect(config(), weights(tensors))
    assert (summary.original_only, summary.does_nothing) == (None, False)


def test_zero_factors_with_a_head_are_not_nothing() -> None:
    dead = {name: tensor * 0 for name, tensor in factors().items()}
    assert reason({**dead, "base_model.model.score.weight": ONE}).startswith("its LoRA does nothing")
    assert not PEFT.inspect(config(), weights({**dead, "base_model.model.score.weight": ONE})).does_nothing


@pytest.mark.parametrize("method", ["LOHA", "IA3", "VERA", "PROMPT_TUNING"])
def test_another_method_is_kept_with_what_its_configuration_says(method: str) -> None:
    fields = {"peft_type": method, "r": 2, "target_modules": ["v_proj", "q_proj"]}
    summary = PEFT.inspect(config(**fields), weights({"x": ONE}))
    assert summary.original_only == f"peft_type is '{method}', not LORA"
    assert (summary.base_model, summary.rank_max, summary.target_modules) == (BASE, 2, ("q_proj", "v_proj"))
    assert (summary.dtype, summary.parameters) == ("F32", 2 * INPUTS)


def test_an_adapter_without_a_base_model_is_inspected() -> None:
    assert PEFT.inspect(config(base_model_name_or_path=None), weights()).base_model is None


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
        assert (summary.original_only is None) == bool(summary.layout)
        assert (summary.original_only or "").isprintable()
        return
    assert refused.message.isprintable()


def test_discovery_and_the_formats_do_not_import_torch() -> None:
    code = (
        "import sys, icmlora.formats.discovery.discovery, icmlora.formats.catalogue; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_file_without_pefts_prefix_is_coded_under_its_own_names() -> None:
    bare = {name.removeprefix("base_model.model."): tensor for name, tensor in factors().items()}
    summary = PEFT.inspect(config(), weights(bare))
    assert (summary.original_only, [shape.module for shape in summary.layout]) == (None, [Q0, V0])
    assert Q0 in summary.template
