"""diffusers' converters from the names of original models, which fuse layers that its own models have apart.

Each gets the spelling that it reads best, whichever spelling a file has. Some of what is called here is private to
diffusers and may move: all of it is in this file and in `image_names.py`, and tests/icmlora/formats/test_image_names.py
and test_image_families.py say what is expected of it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from icmlora.formats.diffusers_models import from_diffusers
from icmlora.formats.image_families import inner_name
from icmlora.formats.kohya import dotted

if TYPE_CHECKING:
    from torch import Tensor

    Pairs = Mapping[str, tuple[Tensor, Tensor]]
    Tensors = dict[str, Tensor]

REFUSALS = (ValueError, LookupError, AssertionError, NotImplementedError, RuntimeError, TypeError)
"""What the converters raise for names and shapes that they do not know."""

# All that the converter of SDXL's original names reads of a UNet's configuration; it is the same for every SDXL.
_SDXL_UNET = SimpleNamespace(layers_per_block=2)
_NEXT_DIT = {re.compile(r"(attention|feed_forward)_"): r"\1."}
_HUNYUAN: Mapping[re.Pattern[str], str] = {
    re.compile(r"_attn\.(qkv|proj)$"): r"_attn_\1",
    re.compile(r"_mlp[._](?:0|fc1)$"): "_mlp.fc1",
    re.compile(r"_mlp[._](?:2|fc2)$"): "_mlp.fc2",
    re.compile(r"(_mod|modulation)[._]lin(ear)?$"): r"\1.linear",
}


def _flux(pairs: Pairs) -> Any:
    mixin = _mixin("Flux")
    if all(".processor." in stem for stem in pairs):
        return mixin.lora_state_dict(_state(pairs, lambda inner: inner, ".down", ".up"))
    return mixin.lora_state_dict(_state(pairs, _flat))


def _flux_2(pairs: Pairs) -> Any:
    if all("." not in inner_name(stem) for stem in pairs):
        return _mixin("Flux2").lora_state_dict(_state(pairs, _flat))
    return _mixin("Flux2").lora_state_dict(_original(pairs))


def _wan(pairs: Pairs) -> Any:
    renames = {re.compile(r"(self_attn|cross_attn|img_emb|head)_"): r"\1."}
    return _mixin("Wan").lora_state_dict(_original(pairs, renames))


def _hunyuan(pairs: Pairs) -> Any:
    state = _original(pairs, _HUNYUAN)
    return from_diffusers("loaders.lora_conversion_utils")._convert_hunyuan_video_lora_to_diffusers(state)


def _z_image(pairs: Pairs) -> Any:
    state = _state(pairs, lambda inner: f"diffusion_model.{_unflattened(inner, _NEXT_DIT)}", ".lora.down", ".lora.up")
    return _mixin("ZImage").lora_state_dict(state)


def _lumina(pairs: Pairs) -> Any:
    return _mixin("Lumina2").lora_state_dict(_original(pairs, _NEXT_DIT))


def _ltx_2(pairs: Pairs) -> Any:
    return _mixin("LTX2").lora_state_dict(_original(pairs))


def _sdxl(pairs: Pairs) -> Any:
    state, _ = _mixin("StableDiffusionXL").lora_state_dict(_state(pairs, _flat), unet_config=_SDXL_UNET)
    return state


CONVERTERS: Mapping[str, Callable[[Pairs], Any]] = {
    "flux-1-dev": _flux,
    "chroma": _flux,
    "flux-2": _flux_2,
    "wan-2.1": _wan,
    "hunyuan-video": _hunyuan,
    "framepack": _hunyuan,
    "z-image": _z_image,
    "lumina-2": _lumina,
    "ltx-2": _ltx_2,
    "stable-diffusion-xl-v1-base": _sdxl,
}
"""Label of a family -> A and B by the names in a file -> tensors by diffusers' names of one generation or another."""


def _mixin(loader: str) -> Any:
    return getattr(from_diffusers("loaders.lora_pipeline"), f"{loader}LoraLoaderMixin")


def _state(
    pairs: Pairs, name: Callable[[str], str], down: str = ".lora_down", up: str = ".lora_up"
) -> dict[str, Tensor]:
    return {
        f"{name(inner_name(stem))}{half}.weight": values
        for stem, pair in pairs.items()
        for half, values in zip((down, up), pair, strict=True)
    }


def _original(pairs: Pairs, renames: Mapping[re.Pattern[str], str] | None = None) -> dict[str, Tensor]:
    return _state(pairs, lambda inner: f"diffusion_model.{_unflattened(inner, renames or {})}", ".lora_A", ".lora_B")


def _flat(inner: str) -> str:
    return f"lora_unet_{inner.replace('.', '_')}"


def _unflattened(inner: str, renames: Mapping[re.Pattern[str], str]) -> str:
    """Put dots into a flattened name, and a model's own words into any name."""
    name = inner if "." in inner else dotted(inner)
    for pattern, word in renames.items():
        name = pattern.sub(word, name)
    return name
