"""What icm expects of diffusers' converters of names, some of which are private to it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from icmlora.errors import AdapterRefused, DataError
from icmlora.formats.images.names import diffusers_to_kohya, lycoris_to_kohya, to_diffusers

Tensors = dict[str, torch.Tensor]


def pair(down: str, up: str, outputs: int = 6, inputs: int = 8) -> Tensors:
    """Return factors of rank 2."""
    return {down: torch.randn(2, inputs), up: torch.randn(outputs, 2)}


def kohya(stem: str, **widths: int) -> Tensors:
    return pair(f"{stem}.lora_down.weight", f"{stem}.lora_up.weight", **widths)


def stems(tensors: Tensors) -> set[str]:
    """Return the names of modules, of which each has both factors under PEFT's names."""
    found = {name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")}
    assert set(tensors) == {f"{name}.lora_{half}.weight" for name in found for half in "AB"}
    return found


BLOCK = "transformer_blocks.0"
TEXT = "text_model.encoder.layers.0"
TO_DIFFUSERS = [
    ("lora_unet_down_blocks_0_attentions_1_proj_in", "unet.down_blocks.0.attentions.1.proj_in"),
    (
        "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_out_0",
        f"unet.mid_block.attentions.0.{BLOCK}.attn1.to_out.0",
    ),
    ("lora_unet_up_blocks_1_resnets_0_conv_shortcut", "unet.up_blocks.1.resnets.0.conv_shortcut"),
    ("lora_unet_down_blocks_0_downsamplers_0_conv", "unet.down_blocks.0.downsamplers.0.conv"),
    ("lora_unet_down_blocks_0_resnets_0_time_emb_proj", "unet.down_blocks.0.resnets.0.time_emb_proj"),
    ("lycoris_down_blocks_0_resnets_0_conv1", "unet.down_blocks.0.resnets.0.conv1"),
    (
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k",
        f"unet.down_blocks.1.attentions.0.{BLOCK}.attn2.to_k",
    ),
    ("lora_unet_middle_block_1_proj_out", "unet.mid_block.attentions.0.proj_out"),
    (
        "lora_unet_output_blocks_3_1_transformer_blocks_0_ff_net_0_proj",
        f"unet.up_blocks.1.attentions.0.{BLOCK}.ff.net.0.proj",
    ),
    ("lora_te_text_model_encoder_layers_0_self_attn_q_proj", f"text_encoder.{TEXT}.self_attn.q_proj"),
    ("lora_te1_text_model_encoder_layers_0_mlp_fc1", f"text_encoder.{TEXT}.mlp.fc1"),
    ("lora_te2_text_model_encoder_layers_0_self_attn_out_proj", f"text_encoder_2.{TEXT}.self_attn.out_proj"),
    ("lora_te2_text_projection", "text_encoder_2.text_projection"),
    ("lora_unet_double_blocks_0_img_attn_proj", "transformer.transformer_blocks.0.attn.to_out.0"),
    ("lora_transformer_single_transformer_blocks_3_attn_to_q", "transformer.single_transformer_blocks.3.attn.to_q"),
]


@pytest.mark.parametrize(("name", "expected"), TO_DIFFUSERS)
def test_a_module_gets_the_name_that_diffusers_has_today(name: str, expected: str) -> None:
    tensors = kohya(name)
    found = to_diffusers(dict(tensors))
    assert stems(found) == {expected}
    assert torch.equal(found[f"{expected}.lora_A.weight"], tensors[f"{name}.lora_down.weight"])
    assert torch.equal(found[f"{expected}.lora_B.weight"], tensors[f"{name}.lora_up.weight"])


def test_a_fused_layer_comes_back_as_the_layers_that_it_is_made_of() -> None:
    tensors = kohya("lora_unet_double_blocks_0_img_attn_qkv", outputs=9)
    found = to_diffusers(dict(tensors))
    inner = "transformer.transformer_blocks.0.attn"
    assert stems(found) == {f"{inner}.to_{part}" for part in "qkv"}
    rows = torch.cat([found[f"{inner}.to_{part}.lora_B.weight"] for part in "qkv"])
    assert torch.equal(rows, tensors["lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight"])


def test_the_first_layer_of_a_single_block_of_flux_is_cut_at_its_real_widths() -> None:
    tensors = kohya("lora_unet_single_blocks_0_linear1", outputs=21504, inputs=3072)
    found = to_diffusers(dict(tensors))
    inner = "transformer.single_transformer_blocks.0"
    parts = [f"{inner}.attn.to_{part}" for part in "qkv"] + [f"{inner}.proj_mlp"]
    assert stems(found) == set(parts)
    rows = torch.cat([found[f"{part}.lora_B.weight"] for part in parts])
    assert torch.equal(rows, tensors["lora_unet_single_blocks_0_linear1.lora_up.weight"])


def test_what_flux_leaves_without_a_component_is_of_its_transformer() -> None:
    found = to_diffusers(kohya("lora_unet_double_blocks_0_img_attn_proj") | kohya("lora_unet_img_in"))
    assert "transformer.x_embedder" in stems(found)


def test_wan_of_kohyas_trainer_has_the_names_of_its_transformer() -> None:
    parts = [f"{kind}_attn_{part}" for kind in ("self", "cross") for part in "qkvo"] + ["ffn_0", "ffn_2"]
    tensors: Tensors = {}
    for part in parts:
        tensors |= kohya(f"lora_unet_blocks_0_{part}")
    found = to_diffusers(dict(tensors))
    inner = ["to_q", "to_k", "to_v", "to_out.0"]
    wanted = [f"attn{number}.{part}" for number in (1, 2) for part in inner] + ["ffn.net.0.proj", "ffn.net.2"]
    assert stems(found) == {f"transformer.blocks.0.{part}" for part in wanted}
    up = tensors["lora_unet_blocks_0_ffn_0.lora_up.weight"]
    assert torch.equal(found["transformer.blocks.0.ffn.net.0.proj.lora_B.weight"], up)


@pytest.mark.parametrize(
    "tensors",
    [
        kohya("lora_prior_blocks_0_attn"),
        kohya("lycoris_blocks_0_attn_to_q"),
        kohya("lora_unet_double_blocks_0_img_attn_proj") | kohya("lora_unet_something_else"),
        kohya("lora_unet_single_blocks_0_linear1"),  # not of the widths that Flux has
    ],
    ids=["unknown", "unknown-lycoris", "unknown-part", "widths"],
)
def test_names_that_diffusers_does_not_know_are_refused(tensors: Tensors) -> None:
    with pytest.raises(AdapterRefused, match="diffusers") as refused:
        to_diffusers(tensors)
    assert refused.value.kind == "layers"


MODULE = f"mid_block.attentions.0.{BLOCK}.attn1"
GENERATIONS = {
    "2025": (f"unet.{MODULE}.to_q.lora_A.weight", f"unet.{MODULE}.to_q.lora_B.weight"),
    "2023": (f"unet.{MODULE}.to_q.lora.down.weight", f"unet.{MODULE}.to_q.lora.up.weight"),
    "processor": (f"unet.{MODULE}.processor.to_q_lora.down.weight", f"unet.{MODULE}.processor.to_q_lora.up.weight"),
    "without a component": (
        f"{MODULE}.processor.to_q_lora.down.weight",
        f"{MODULE}.processor.to_q_lora.up.weight",
    ),
}


@pytest.mark.parametrize("names", GENERATIONS.values(), ids=GENERATIONS)
def test_every_generation_of_diffusers_has_one_name_in_kohyas_programs(names: tuple[str, str]) -> None:
    stem = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    found = diffusers_to_kohya(pair(*names), is_sdxl=False)
    assert set(found) == {f"{stem}.lora_down.weight", f"{stem}.lora_up.weight"}


@pytest.mark.parametrize(
    ("modules", "is_sdxl", "expected"),
    [
        (["text_encoder"], False, ["lora_te"]),
        (["text_encoder"], True, ["lora_te1"]),
        (["text_encoder", "text_encoder_2"], False, ["lora_te1", "lora_te2"]),
    ],
)
@pytest.mark.parametrize("prefix", ["", "text_model."])
def test_text_encoders_are_numbered_where_there_are_two(
    modules: list[str], is_sdxl: bool, expected: list[str], prefix: str
) -> None:
    tensors: Tensors = {}
    for name in modules:
        stem = f"{name}.{prefix}encoder.layers.0.mlp.fc1"
        tensors |= pair(f"{stem}.lora_A.weight", f"{stem}.lora_B.weight")
    found = diffusers_to_kohya(tensors, is_sdxl=is_sdxl)
    assert {name.partition(".")[0] for name in found} == {
        f"{name}_text_model_encoder_layers_0_mlp_fc1" for name in expected
    }


def test_there_is_no_way_back_from_diffusers_transformers() -> None:
    stem = "transformer.transformer_blocks.0.attn.to_q"
    with pytest.raises(AdapterRefused, match="no converter from transformer names to kohya names"):
        diffusers_to_kohya(pair(f"{stem}.lora_A.weight", f"{stem}.lora_B.weight"), is_sdxl=False)


def test_lycoris_of_another_model_has_other_names_than_kohya() -> None:
    with pytest.raises(AdapterRefused, match="not in a UNet"):
        lycoris_to_kohya(kohya("lycoris_transformer_blocks_0_attn_to_q"))


def test_without_diffusers_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def without(name: str, package: str | None = None) -> Any:
        raise ImportError(name)

    monkeypatch.setattr("importlib.import_module", without)
    with pytest.raises(DataError, match="needs diffusers") as error:
        to_diffusers(kohya("lora_unet_down_blocks_0_attentions_1_proj_in"))
    assert "icm-lora[diffusion]" in (error.value.hint or "")
