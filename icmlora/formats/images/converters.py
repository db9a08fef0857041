"""diffusers' converters from the names of original models, which fuse layers that are separate in its own models.

Each converter gets the spelling it reads best, regardless of the file's spelling. Some calls are private to diffusers
and may move: they are all in this file and in `names.py`, and tests/icmlora/formats/test_image_names.py and
test_image_families.py check them.

Sources: huggingface/diffusers, loaders/lora_pipeline.py; Comfy-Org/ComfyUI, comfy/utils.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from types import MappingProxyType, SimpleNamespace
from typing import TYPE_CHECKING, Any

from icmlora.formats.images.diffusers_models import from_diffusers
from icmlora.formats.images.families import inner_name
from icmlora.formats.images.kohya import dotted

if TYPE_CHECKING:
    from torch import Tensor

    Pairs = Mapping[str, tuple[Tensor, Tensor]]
    Tensors = dict[str, Tensor]

REFUSALS = (ValueError, LookupError, AssertionError, NotImplementedError, RuntimeError, TypeError)
"""Errors that the converters raise for unknown names and shapes."""

# The only value that the converter of SDXL's original names reads from a UNet's configuration; equal for every SDXL.
_SDXL_UNET = SimpleNamespace(layers_per_block=2)
# Expressions -> replacements in the names of original models.
_NEXT_DIT = {r"(attention|feed_forward)_": r"\1."}
_ATTENTION = {r"(self_attn|cross_attn|mlp)_": r"\1."}
_HUNYUAN = {
    r"_attn\.(qkv|proj)$": r"_attn_\1",
    r"_mlp[._](?:0|fc1)$": "_mlp.fc1",
    r"_mlp[._](?:2|fc2)$": "_mlp.fc2",
    r"(_mod|modulation)[._]lin(ear)?$": r"\1.linear",
}
# diffusers converts whole models of these families, but not their adapters: names in a block, with "_" for ".".
_SD3 = {
    **{
        f"{block}_{theirs}": ours
        for block, ff, norm in (("x_block", "ff", "norm1"), ("context_block", "ff_context", "norm1_context"))
        for theirs, ours in (
            ("mlp_fc1", f"{ff}.net.0.proj"),
            ("mlp_fc2", f"{ff}.net.2"),
            ("adaLN_modulation_1", f"{norm}.linear"),
        )
    },
    "x_block_attn_qkv": "attn.to_q attn.to_k attn.to_v",
    "x_block_attn_proj": "attn.to_out.0",
    "x_block_attn2_qkv": "attn2.to_q attn2.to_k attn2.to_v",
    "x_block_attn2_proj": "attn2.to_out.0",
    "context_block_attn_qkv": "attn.add_q_proj attn.add_k_proj attn.add_v_proj",
    "context_block_attn_proj": "attn.to_add_out",
}
_AURA_MLP = {"c_fc1": "linear_1", "c_fc2": "linear_2", "c_proj": "out_projection"}
_AURA_DOUBLE = {
    **{
        f"mlp{stream}_{theirs}": f"{ff}.{ours}"
        for theirs, ours in _AURA_MLP.items()
        for stream, ff in (("X", "ff"), ("C", "ff_context"))
    },
    **{f"attn_w2{part}": f"attn.to_{part}" for part in "qkv"},
    **{f"attn_w1{part}": f"attn.add_{part}_proj" for part in "qkv"},
    "attn_w2o": "attn.to_out.0",
    "attn_w1o": "attn.to_add_out",
    "modX_1": "norm1.linear",
    "modC_1": "norm1_context.linear",
}
_AURA_SINGLE = {
    **{f"mlp_{theirs}": f"ff.{ours}" for theirs, ours in _AURA_MLP.items()},
    **{f"attn_w1{part}": f"attn.to_{part}" for part in "qkv"},
    "attn_w1o": "attn.to_out.0",
    "modCX_1": "norm1.linear",
}
# ComfyUI's `pixart_to_diffusers` (comfy/utils.py) has these names; diffusers has no converter for them.
_PIXART = {
    "attn_qkv": "attn1.to_q attn1.to_k attn1.to_v",
    "attn_proj": "attn1.to_out.0",
    "cross_attn_q_linear": "attn2.to_q",
    "cross_attn_kv_linear": "attn2.to_k attn2.to_v",
    "cross_attn_proj": "attn2.to_out.0",
    "mlp_fc1": "ff.net.0.proj",
    "mlp_fc2": "ff.net.2",
}
# diffusers' converter for Wan lacks the blocks that VACE adds.
_VACE = {
    **{
        f"{attention}_attn_{theirs}": f"{name}.{ours}"
        for attention, name in (("self", "attn1"), ("cross", "attn2"))
        for theirs, ours in {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0"}.items()
    },
    "cross_attn_k_img": "attn2.add_k_proj",
    "cross_attn_v_img": "attn2.add_v_proj",
    "ffn_0": "ffn.net.0.proj",
    "ffn_2": "ffn.net.2",
    "before_proj": "proj_in",
    "after_proj": "proj_out",
}
_IN_BLOCK = re.compile(r"(\w+?)[._](\d+)[._](.+)")


def _by_table(**tables: tuple[str, Mapping[str, str]]) -> Callable[[Pairs], Any]:
    """Return a converter that uses tables of names.

    Args:
        tables: Original name of the blocks -> diffusers' name, and the names in a block.
    """

    def convert(pairs: Pairs) -> Tensors:
        found: Tensors = {}
        for stem, (a, b) in pairs.items():
            match = _IN_BLOCK.fullmatch(inner_name(stem))
            blocks, table = ("", {}) if match is None else tables.get(match[1], ("", {}))
            parts = [] if match is None else table.get(match[3].replace(".", "_"), "").split()
            if match is None or not parts or len(b) % len(parts):
                raise ValueError(f"it has no name for {stem}")
            if parts == ["norm1_context.linear"] and len(b) == 2 * a.shape[1]:
                # SD3's last block stores shift before scale, diffusers scale before shift.
                b = b.roll(len(b) // 2, 0)
            for part, rows in zip(parts, b.chunk(len(parts)), strict=True):
                name = f"transformer.{blocks}.{match[2]}.{part}"
                found |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": rows}
        return found

    return convert


_stable_diffusion_3 = _by_table(joint_blocks=("transformer_blocks", _SD3))
_auraflow = _by_table(
    double_layers=("joint_transformer_blocks", _AURA_DOUBLE), single_layers=("single_transformer_blocks", _AURA_SINGLE)
)
_pixart = _by_table(blocks=("transformer_blocks", _PIXART))
_vace_blocks = _by_table(vace_blocks=("vace_blocks", _VACE))


def _mixin(loader: str) -> Any:
    return getattr(from_diffusers("loaders.lora_pipeline"), f"{loader}LoraLoaderMixin").lora_state_dict


def _by_mixin(
    loader: str, renames: Mapping[str, str] = MappingProxyType({}), *, may_be_flat: bool = False
) -> Callable[[Pairs], Any]:
    """Return diffusers' own converter of a pipeline, which reads the names of the original model.

    Args:
        loader: Prefix of its class name.
        renames: Expression -> replacement in a name, after dots were inserted.
        may_be_flat: Whether it also reads kohya's flattened names.
    """

    def convert(pairs: Pairs) -> Any:
        is_flat = may_be_flat and all("." not in inner_name(stem) for stem in pairs)
        return _mixin(loader)(_state(pairs, _flat) if is_flat else _original(pairs, renames))

    return convert


_wan = _by_mixin("Wan", {r"(self_attn|cross_attn|img_emb|head)_": r"\1."})


def _flux(pairs: Pairs) -> Any:
    if all(".processor." in stem for stem in pairs):
        return _mixin("Flux")(_state(pairs, lambda inner: inner, ".down", ".up"))
    return _mixin("Flux")(_state(pairs, _flat))


def _wan_vace(pairs: Pairs) -> Any:
    added = {stem: pair for stem, pair in pairs.items() if inner_name(stem).startswith("vace_blocks")}
    others = {stem: pair for stem, pair in pairs.items() if stem not in added}
    return _vace_blocks(added) | (_wan(others) if others else {})


def _hunyuan(pairs: Pairs) -> Any:
    convert = from_diffusers("loaders.lora_conversion_utils")._convert_hunyuan_video_lora_to_diffusers
    return convert(_original(pairs, _HUNYUAN))


def _z_image(pairs: Pairs) -> Any:
    return _mixin("ZImage")(_original(pairs, _NEXT_DIT, ".lora.down", ".lora.up"))


def _ace_step(pairs: Pairs) -> Any:
    state = _state(pairs, lambda inner: _unflattened(inner, _ATTENTION), ".lora_A", ".lora_B")
    return from_diffusers("loaders.lora_conversion_utils")._convert_non_diffusers_ace_step_lora_to_diffusers(state)


def _sdxl(pairs: Pairs) -> Any:
    state, _ = _mixin("StableDiffusionXL")(_state(pairs, _flat), unet_config=_SDXL_UNET)
    return state


CONVERTERS: Mapping[str, Callable[[Pairs], Any]] = {
    "flux-1-dev": _flux,
    "chroma": _flux,
    "flux-2": _by_mixin("Flux2", may_be_flat=True),
    "flux-3": _by_mixin("Flux3"),
    "wan-2.1": _wan,
    "wan-2.1-vace": _wan_vace,
    "hunyuan-video": _hunyuan,
    "framepack": _hunyuan,
    "z-image": _z_image,
    "lumina-2": _by_mixin("Lumina2", _NEXT_DIT),
    "ideogram-4": _by_mixin("Ideogram4", _NEXT_DIT),
    "krea-2": _by_mixin("Krea2"),
    "cosmos-predict-2": _by_mixin("Anima", {r"(?<=\.)(self_attn|cross_attn|mlp)_": r"\1."}),
    "ltx-video": _by_mixin("LTXVideo", {"^patchify_proj": "proj_in", "^adaln_single": "time_embed"}),
    "ltx-2": _by_mixin("LTX2"),
    "stable-diffusion-xl-v1-base": _sdxl,
    "stable-diffusion-3": _stable_diffusion_3,
    "stable-diffusion-3-5-medium": _stable_diffusion_3,
    "auraflow": _auraflow,
    "pixart": _pixart,
    "minimax-h3": _by_mixin("MiniMaxH3", may_be_flat=True),
    "ace-step-1.5": _ace_step,
}
"""Label of a family -> function from A and B by name in the file to tensors by diffusers' names of some generation."""


def _state(
    pairs: Pairs, name: Callable[[str], str], down: str = ".lora_down", up: str = ".lora_up"
) -> dict[str, Tensor]:
    return {
        f"{name(inner_name(stem))}{half}.weight": values
        for stem, pair in pairs.items()
        for half, values in zip((down, up), pair, strict=True)
    }


def _original(
    pairs: Pairs, renames: Mapping[str, str], down: str = ".lora_A", up: str = ".lora_B"
) -> dict[str, Tensor]:
    return _state(pairs, lambda inner: f"diffusion_model.{_unflattened(inner, renames)}", down, up)


def _flat(inner: str) -> str:
    return f"lora_unet_{inner.replace('.', '_')}"


def _unflattened(inner: str, renames: Mapping[str, str]) -> str:
    """Return a name with dots restored and a model's replacements applied."""
    name = inner if "." in inner else dotted(inner)
    for expression, word in renames.items():
        name = re.sub(expression, word, name)
    return name
