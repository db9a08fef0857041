"""Adapters of every family that diffusers loads, in the spellings of real programs: what becomes of their names."""

from __future__ import annotations

from pathlib import Path

import diffusers
import pytest
import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import nn

from icmlora import AdapterRefused, convert
from icmlora.formats.discovery.discovery import find_adapters
from icmlora.formats.images.families import FAMILIES, UNET, ImageBase
from icmlora.formats.images.names import to_diffusers
from tests.icmlora.formats.single_files import Tensors, linear, values, write

CONVERTIBLE = {family.label: family for family in FAMILIES if family.model is not None}
# Family -> module of the original model: rows, width, and the modules of diffusers' model that the rows are of.
Original = dict[str, tuple[int, int, list[str]]]
DOUBLE, SINGLE = "transformer_blocks.0", "single_transformer_blocks.0"
QKV = [f"{DOUBLE}.attn.to_{part}" for part in "qkv"]
ADDED = [f"{DOUBLE}.attn.add_{part}_proj" for part in "qkv"]
FLUX: Original = {
    "double_blocks.0.img_attn.qkv": (9, 6, QKV),
    "double_blocks.0.txt_attn.qkv": (9, 6, ADDED),
    "double_blocks.0.txt_attn.proj": (6, 6, [f"{DOUBLE}.attn.to_add_out"]),
    "double_blocks.0.img_mlp.0": (12, 6, [f"{DOUBLE}.ff.net.0.proj"]),
    "single_blocks.0.linear2": (6, 12, [f"{SINGLE}.proj_out"]),
    "single_blocks.0.linear1": (21504, 6, [*(f"{SINGLE}.attn.to_{part}" for part in "qkv"), f"{SINGLE}.proj_mlp"]),
}
LUMINA = {
    "attention.qkv": (3840, 6, [f"layers.0.attn.to_{part}" for part in "qkv"]),
    "attention.out": (6, 6, ["layers.0.attn.to_out.0"]),
    **{f"feed_forward.w{part}": (12, 6, [f"layers.0.feed_forward.linear_{part}"]) for part in (1, 2, 3)},
    "adaLN_modulation.1": (6, 6, ["layers.0.norm1.linear"]),
}
ORIGINALS: dict[str, Original] = {
    "flux-1-dev": FLUX | {"double_blocks.0.img_mod.lin": (6, 6, [f"{DOUBLE}.norm1.linear"])},
    "chroma": FLUX,
    "flux-2-dev": {
        "double_blocks.0.img_attn.qkv": (9, 6, QKV),
        "double_blocks.0.txt_mlp.2": (6, 9, [f"{DOUBLE}.ff_context.linear_out"]),
        "single_blocks.0.linear1": (30, 6, [f"{SINGLE}.attn.to_qkv_mlp_proj"]),
        "single_blocks.0.linear2": (6, 12, [f"{SINGLE}.attn.to_out"]),
    },
    "flux-3": {
        "single_blocks.0.q_proj": (6, 6, [f"{SINGLE}.attn.to_q"]),
        "content_mode_blocks.image.0.mlp_in": (12, 6, ["mode_blocks.image.0.ff.linear_in"]),
    },
    "hunyuan-video": {
        "double_blocks.0.img_attn_qkv": (9, 6, QKV),
        "double_blocks.0.txt_attn_qkv": (9, 6, ADDED),
        "double_blocks.0.img_attn_proj": (6, 6, [f"{DOUBLE}.attn.to_out.0"]),
        "double_blocks.0.img_mlp.fc1": (12, 6, [f"{DOUBLE}.ff.net.0.proj"]),
        "double_blocks.0.txt_mod.linear": (6, 6, [f"{DOUBLE}.norm1_context.linear"]),
        "single_blocks.0.modulation.linear": (6, 6, [f"{SINGLE}.norm.linear"]),
        "single_blocks.0.linear1": FLUX["single_blocks.0.linear1"],
        "single_blocks.0.linear2": FLUX["single_blocks.0.linear2"],
    },
    "wan-2.1": {
        "blocks.0.self_attn.q": (6, 6, ["blocks.0.attn1.to_q"]),
        "blocks.3.self_attn.o": (6, 6, ["blocks.3.attn1.to_out.0"]),
        "blocks.0.cross_attn.k_img": (6, 6, ["blocks.0.attn2.add_k_proj"]),
        "blocks.0.cross_attn.v_img": (6, 6, ["blocks.0.attn2.add_v_proj"]),
        "blocks.0.ffn.2": (6, 8, ["blocks.0.ffn.net.2"]),
    },
    "wan-2.1-vace": {
        "blocks.0.self_attn.q": (6, 6, ["blocks.0.attn1.to_q"]),
        "vace_blocks.0.self_attn.q": (6, 6, ["vace_blocks.0.attn1.to_q"]),
        "vace_blocks.0.cross_attn.k_img": (6, 6, ["vace_blocks.0.attn2.add_k_proj"]),
        "vace_blocks.0.before_proj": (6, 6, ["vace_blocks.0.proj_in"]),
        "vace_blocks.3.after_proj": (6, 6, ["vace_blocks.3.proj_out"]),
        "vace_blocks.3.ffn.0": (8, 6, ["vace_blocks.3.ffn.net.0.proj"]),
    },
    "pixart": {
        "blocks.0.attn.qkv": (9, 6, [f"{DOUBLE}.attn1.to_{part}" for part in "qkv"]),
        "blocks.0.cross_attn.q_linear": (6, 6, [f"{DOUBLE}.attn2.to_q"]),
        "blocks.0.cross_attn.kv_linear": (6, 6, [f"{DOUBLE}.attn2.to_k", f"{DOUBLE}.attn2.to_v"]),
        "blocks.3.mlp.fc1": (8, 6, ["transformer_blocks.3.ff.net.0.proj"]),
    },
    "minimax-h3": {
        "blocks.0.attn.qkv_proj": (9, 6, QKV),
        "blocks.3.attn.out_proj": (6, 6, ["transformer_blocks.3.attn.to_out.0"]),
        "blocks.0.adaln_proj.linear": (8, 6, [f"{DOUBLE}.adaln_proj.linear"]),
        "token_refiner.blocks.0.mlp.fc2": (6, 8, ["token_refiner.refiner_blocks.0.ff.net.2"]),
        "final_layer.video_out": (6, 6, ["proj_out"]),
    },
    "ace-step-1.5": {
        "layers.0.self_attn.q_proj": (6, 6, ["layers.0.self_attn.to_q"]),
        "layers.3.cross_attn.o_proj": (6, 6, ["layers.3.cross_attn.to_out.0"]),
        "layers.0.mlp.gate_proj": (8, 6, ["layers.0.mlp.gate_proj"]),
    },
    "z-image": {
        "layers.0.attention.qkv": (9, 6, [f"layers.0.attention.to_{part}" for part in "qkv"]),
        "layers.0.attention.out": (6, 6, ["layers.0.attention.to_out.0"]),
        "layers.0.feed_forward.w1": (8, 6, ["layers.0.feed_forward.w1"]),
        "layers.0.adaLN_modulation.0": (8, 6, ["layers.0.adaLN_modulation.0"]),
    },
    "lumina-2": {f"layers.0.{name}": found for name, found in LUMINA.items()},
    "qwen-image": {
        "transformer_blocks.0.attn.to_out.0": (6, 6, ["transformer_blocks.0.attn.to_out.0"]),
        "transformer_blocks.0.img_mlp.net.0.proj": (8, 6, ["transformer_blocks.0.img_mlp.net.0.proj"]),
        "transformer_blocks.11.txt_mod.1": (8, 6, ["transformer_blocks.11.txt_mod.1"]),
    },
    "hidream-i1": {
        "double_stream_blocks.0.block.attn1.to_q": (6, 6, ["double_stream_blocks.0.block.attn1.to_q"]),
        "single_stream_blocks.0.block.ff_i.shared_experts.w1": (
            8,
            6,
            ["single_stream_blocks.0.block.ff_i.shared_experts.w1"],
        ),
    },
    "stable-diffusion-3": {
        "joint_blocks.0.x_block.attn.qkv": (9, 6, QKV),
        "joint_blocks.0.context_block.attn.qkv": (9, 6, ADDED),
        "joint_blocks.0.x_block.attn2.proj": (6, 6, [f"{DOUBLE}.attn2.to_out.0"]),
        "joint_blocks.0.x_block.mlp.fc1": (12, 6, [f"{DOUBLE}.ff.net.0.proj"]),
        "joint_blocks.0.context_block.adaLN_modulation.1": (36, 6, [f"{DOUBLE}.norm1_context.linear"]),
    },
    "auraflow": {
        "double_layers.0.attn.w2q": (6, 6, [f"joint_{DOUBLE}.attn.to_q"]),
        "double_layers.0.attn.w1o": (6, 6, [f"joint_{DOUBLE}.attn.to_add_out"]),
        "double_layers.0.mlpC.c_proj": (6, 8, [f"joint_{DOUBLE}.ff_context.out_projection"]),
        "single_layers.3.mlp.c_fc2": (8, 6, ["single_transformer_blocks.3.ff.linear_2"]),
        "single_layers.3.modCX.1": (36, 6, ["single_transformer_blocks.3.norm1.linear"]),
    },
    "ideogram-4": {
        "layers.0.attention.qkv": (9, 6, [f"layers.0.attention.to_{part}" for part in "qkv"]),
        "layers.0.attention.o": (6, 6, ["layers.0.attention.to_out.0"]),
        "layers.0.feed_forward.w2": (6, 8, ["layers.0.feed_forward.w2"]),
    },
    "krea-2": {
        "blocks.0.attn.wo": (6, 6, ["transformer_blocks.0.attn.to_out.0"]),
        "blocks.0.mlp.down": (6, 8, ["transformer_blocks.0.ff.down"]),
        "tproj.1": (12, 6, ["time_mod_proj"]),
    },
    "cosmos-predict-2": {
        "blocks.0.self_attn.output_proj": (6, 6, ["transformer_blocks.0.attn1.to_out.0"]),
        "blocks.0.adaln_modulation_cross_attn.1": (6, 6, ["transformer_blocks.0.norm2.linear_1"]),
        "blocks.0.mlp.layer1": (8, 6, ["transformer_blocks.0.ff.net.0.proj"]),
    },
    "ltx-video": {
        "transformer_blocks.0.attn2.to_k": (6, 6, ["transformer_blocks.0.attn2.to_k"]),
        "patchify_proj": (6, 6, ["proj_in"]),
    },
    "ltx-2": {
        "transformer_blocks.0.audio_attn1.to_q": (6, 6, ["transformer_blocks.0.audio_attn1.to_q"]),
        "patchify_proj": (6, 6, ["proj_in"]),
        "adaln_single.linear": (6, 6, ["time_embed.linear"]),
    },
}
# Prefix and names of the factors of real programs; the last flattens the names.
SPELLINGS = {
    "ai-toolkit": ("diffusion_model.{}", "lora_A", "lora_B"),
    "comfyui": ("diffusion_model.{}", "lora_down", "lora_up"),
    "fal": ("base_model.model.{}", "lora_A", "lora_B"),
    "kohya": ("lora_unet_{}", "lora_down", "lora_up"),
}
FAL = ("flux-1-dev", "flux-2-dev", "chroma", "qwen-image", "minimax-h3", "ace-step-1.5")
WRITTEN = [
    (label, spelling)
    for label in ORIGINALS
    for spelling in SPELLINGS
    if (spelling != "kohya" or label not in ("ltx-2", "ltx-video", "krea-2", "flux-3"))
    and (spelling != "fal" or label in FAL)
]


def written(path: Path, label: str, spelling: str) -> tuple[Path, dict[str, torch.Tensor]]:
    """Write a file of a family's original names; return dW by the names of diffusers' modules too."""
    prefix, down, up = SPELLINGS[spelling]
    tensors, deltas = dict[str, torch.Tensor](), dict[str, torch.Tensor]()
    for seed, (module, (rows, width, parts)) in enumerate(ORIGINALS[label].items()):
        stem = prefix.format(module.replace(".", "_") if spelling == "kohya" else module)
        made = linear("down", "up", rank=2, inputs=width, outputs=rows, seed=100 * seed)
        tensors |= {f"{stem}.{down}.weight": made["down"], f"{stem}.{up}.weight": made["up"]}
        if down == "lora_down":
            tensors[f"{stem}.alpha"] = torch.tensor(1.0)
        delta = made["up"] @ made["down"] * (0.5 if down == "lora_down" else 1.0)
        sizes = {21504: [3072, 3072, 3072, 12288], 3840: [2304, 768, 768]}.get(rows, [rows // len(parts)] * len(parts))
        deltas |= dict(zip(parts, delta.split(sizes), strict=True))
    return write(path, tensors, {"ss_base_model_version": label}), deltas


def factors(path: Path) -> dict[str, torch.Tensor]:
    """Return dW by the names of a transformer's modules."""
    tensors = load_file(path)
    stems = {name.rpartition(".lora_")[0] for name in tensors}
    assert set(tensors) == {f"{stem}.lora_{half}.weight" for stem in stems for half in "AB"}
    return {
        stem.removeprefix("transformer."): tensors[f"{stem}.lora_B.weight"] @ tensors[f"{stem}.lora_A.weight"]
        for stem in stems
    }


@pytest.mark.parametrize(("label", "spelling"), WRITTEN)
def test_original_names_become_the_modules_of_diffusers(label: str, spelling: str, tmp_path: Path) -> None:
    source, wanted = written(tmp_path / "x.safetensors", label, spelling)
    convert(source, tmp_path / "out.safetensors", adapter_format="diffusers", dtype="float32")
    found = factors(tmp_path / "out.safetensors")
    assert found.keys() == wanted.keys()
    for name, delta in wanted.items():
        torch.testing.assert_close(found[name], delta, rtol=1e-6, atol=1e-6)


def test_the_halves_of_a_gate_of_minimax_h3_change_places(tmp_path: Path) -> None:
    made = linear("down", "up", rank=2, inputs=6, outputs=8)
    stem = "diffusion_model.blocks.0.mlp.fc1"
    tensors = {f"{stem}.lora_A.weight": made["down"], f"{stem}.lora_B.weight": made["up"]}
    source = write(tmp_path / "x.safetensors", tensors, {"ss_base_model_version": "minimax-h3"})
    convert(source, tmp_path / "out.safetensors", adapter_format="diffusers", dtype="float32")
    wanted = (made["up"] @ made["down"]).roll(4, 0)  # [gate; value] there, [value; gate] in diffusers
    torch.testing.assert_close(factors(tmp_path / "out.safetensors"), {f"{DOUBLE}.ff.net.0.proj": wanted})


def test_fused_layers_of_minimax_h3_in_the_order_of_diffsynth_are_refused_by_name() -> None:
    names = (f"blocks.0.attn.qkv_proj.lora_{half}.default.weight" for half in "AB")
    with pytest.raises(AdapterRefused, match=r"blocks\.0\.attn\.qkv_proj\.lora_B.* DiffSynth's order"):
        to_diffusers(linear(*names), ImageBase("minimax-h3"))


# Without the two whose names others have too; real files of these are told by their widths.
@pytest.mark.parametrize("label", sorted(ORIGINALS.keys() - {"flux-2-dev", "lumina-2"}))
def test_a_family_is_known_by_its_names_where_the_header_is_gone(label: str, tmp_path: Path) -> None:
    source, wanted = written(tmp_path / "x.safetensors", label, "ai-toolkit")
    found = to_diffusers(load_file(source))
    assert {name.removeprefix("transformer.").rpartition(".lora_")[0] for name in found} == wanted.keys()


@pytest.mark.one_case
@pytest.mark.filterwarnings("ignore::FutureWarning")  # of diffusers, about its own parts
@pytest.mark.parametrize("label", CONVERTIBLE)
def test_the_modules_of_diffusers_keep_their_names_under_any_prefix(label: str) -> None:
    family = CONVERTIBLE[label]
    with torch.device("meta"):
        model: nn.Module = getattr(diffusers, family.model or "")(**family.options)
    names = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear) and ".0." in name][:12]
    component = "unet" if family.model == UNET else "transformer"
    wanted = {f"{component}.{name}.lora_{half}.weight" for name in names for half in "AB"}
    for stem in ("{}.{}", "diffusion_model.{1}", "lycoris_{2}", "lora_transformer_{2}", "lora_unet_{2}"):
        tensors: Tensors = {}
        for name in names:
            module = stem.format(component, name, name.replace(".", "_"))
            tensors |= linear(f"{module}.lora_down.weight", f"{module}.lora_up.weight")
        assert to_diffusers(tensors, ImageBase(label)).keys() == wanted


TINY = {
    "qwen-image": lambda: diffusers.QwenImageTransformer2DModel(
        num_layers=1, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=16, axes_dims_rope=(4, 6, 6)
    ),
    "stable-diffusion-3": lambda: diffusers.SD3Transformer2DModel(
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=16,
    ),
}


@pytest.mark.parametrize("label", TINY)
def test_dotted_names_of_onetrainer_load_into_the_model(label: str, tmp_path: Path) -> None:
    model, tensors, wanted = TINY[label](), dict[str, torch.Tensor](), dict[str, torch.Tensor]()
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and "transformer_blocks" in name:
            down, up = values(2, layer.in_features), values(layer.out_features, 2)
            stem = f"transformer.{name}"
            tensors |= {
                f"{stem}.lora_down.weight": down,
                f"{stem}.lora_up.weight": up,
                f"{stem}.alpha": torch.tensor(1.0),
            }
            wanted[name] = up @ down / 2
    source = write(tmp_path / "x.safetensors", tensors, {"ss_base_model_version": label})
    (task,) = find_adapters([source]).tasks
    assert task.final.format.name == "comfyui"
    convert(source, tmp_path / "out.safetensors", adapter_format="diffusers", dtype="float32")
    model.load_lora_adapter(load_file(tmp_path / "out.safetensors"), prefix="transformer")
    loaded = {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}
    assert loaded.keys() == wanted.keys()
    for name, delta in wanted.items():
        torch.testing.assert_close(loaded[name].get_delta_weight("default_0"), delta, rtol=1e-6, atol=1e-6)


# text encoders

CLIP = "text_model_encoder_layers_0_self_attn_q_proj"
T5 = "encoder_block_0_layer_0_SelfAttention_q"


@pytest.mark.parametrize("base", [ImageBase("flux-1-dev"), ImageBase("qwen-image", is_guess=True), ImageBase(None)])
def test_onetrainers_flux_with_a_text_encoder_is_converted(base: ImageBase) -> None:
    tensors = linear(f"lora_te1_{CLIP}.lora_down.weight", f"lora_te1_{CLIP}.lora_up.weight")
    block = "lora_transformer_transformer_blocks_0_attn_to_q"
    found = to_diffusers(tensors | linear(f"{block}.lora_down.weight", f"{block}.lora_up.weight"), base)
    assert {name.rpartition(".lora_")[0] for name in found} == {
        "text_encoder.text_model.encoder.layers.0.self_attn.q_proj",
        "transformer.transformer_blocks.0.attn.to_q",
    }


@pytest.mark.parametrize(
    ("label", "stem"),
    [
        ("stable-diffusion-3", f"lora_te3_{T5}"),
        ("flux-1-dev", f"lora_te2_{T5}"),
        ("flux-1-dev", "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q"),
        ("qwen-image", f"lora_te_{CLIP}"),
    ],
)
def test_a_text_encoder_that_diffusers_does_not_load_is_refused_by_name(label: str, stem: str) -> None:
    block = "lora_transformer_transformer_blocks_0_attn_to_q"
    tensors = linear(f"{block}.lora_down.weight", f"{block}.lora_up.weight")
    with pytest.raises(AdapterRefused, match=rf"no converter for {stem}: it would be lost \(diffusers loads"):
        to_diffusers(tensors | linear(f"{stem}.lora_down.weight", f"{stem}.lora_up.weight"), ImageBase(label))


# what is refused


@pytest.mark.parametrize(
    ("label", "module"),
    [
        ("flux-1-dev", "double_blocks.0.img_attn.something"),
        ("hunyuan-video", "double_blocks.0.something"),
        ("chroma", "double_blocks.0.img_mod.lin"),
        ("wan-2.1", "vace_blocks.0.self_attn.q"),
        ("wan-2.1-vace", "vace_blocks.0.something"),
        ("pixart", "blocks.0.attn.something"),
        ("minimax-h3", "blocks.0.attn.something"),
        ("ace-step-1.5", "layers.0.self_attn.something"),
        ("ace-step-1", "transformer_blocks.0.attn.to_q"),
        ("z-image", "layers.0.attention.something"),
        ("kandinsky-5", "visual_transformer_blocks.0.something"),
        ("stable-video-diffusion", "mid_block.attentions.0.temporal_transformer_blocks.0.attn1.to_q"),
    ],
)
def test_what_is_no_module_of_the_model_is_refused_before_a_value_is_read(
    label: str, module: str, tmp_path: Path
) -> None:
    stem = f"diffusion_model.{module}"
    tensors = linear(f"{stem}.lora_A.weight", f"{stem}.lora_B.weight")
    source = write(tmp_path / "x.safetensors", tensors, {"ss_base_model_version": label})
    source.write_bytes(source.read_bytes()[:-4] + b"\x00\x00\xc0\x7f")  # NaN, which would be refused by its own name
    with pytest.raises(AdapterRefused, match="diffusers") as refused:
        convert(source, tmp_path / "out.safetensors", adapter_format="diffusers")
    assert refused.value.kind == "layers"
    assert not (tmp_path / "out.safetensors").exists()
