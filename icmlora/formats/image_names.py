"""Names of image adapters in another program's language, by diffusers' own converters.

    kohya, ComfyUI, XLabs, LyCORIS ──lora_state_dict of a pipeline──▶ names of one of diffusers' generations
                                                   ──convert_*_to_peft──▶ unet.….lora_A.weight
    diffusers ──convert_*_to_peft──▶ unet.….lora_A.weight ──convert_state_dict_to_kohya──▶ lora_unet_….lora_down.weight

Some of what is called here is private to diffusers and may move: all of it is in this file, and
tests/icmlora/formats/test_image_names.py says what is expected of it. Fused layers come back as several, with parts of
the same tensors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from icmlora.errors import AdapterRefused, DataError

if TYPE_CHECKING:
    from torch import Tensor

Tensors = Mapping[str, "Tensor"]

# What diffusers calls the loader -> names by which its adapters are known; the first that fits has it.
_LOADERS: Mapping[str, re.Pattern[str]] = {
    "Flux": re.compile(r"(.*[._])?(double_blocks|single_blocks|single_transformer_blocks)[._]\d"),
    "Wan": re.compile(r"(diffusion_model\.|lora_unet_)blocks[._]\d+[._](self_attn|cross_attn|ffn)"),
    "StableDiffusionXL": re.compile(r"lora_(te2|unet_(input_blocks|middle_block|output_blocks|label_emb))_"),
    "StableDiffusion": re.compile(r"lora_(te1?|unet_(down_blocks|mid_block|up_blocks))_"),
}
# All that the converter of SDXL's original names reads of a UNet's configuration; it is the same for every SDXL.
_SDXL_UNET = SimpleNamespace(layers_per_block=2)
# Kohya's names of diffusers' Flux and of Wan are not read without alphas.
_NEEDS_ALPHA = re.compile(r"lora_(transformer|unet_blocks)_.+\.lora_down\.weight")
_COMPONENT = re.compile(r"(unet|transformer(_\d)?|text_encoder(_\d)?)\.")
_SHORT_TEXT = re.compile(r"^(text_encoder(?:_2)?\.)(?!text_model\.|text_projection)")
_UNET_OF_LYCORIS = re.compile(r"lycoris_(?=(down_blocks|mid_block|up_blocks|conv_in|conv_out|time_embedding)_)")


def to_diffusers(tensors: Tensors) -> dict[str, Tensor]:
    """Rename factors with alpha = r to diffusers' names of today, `unet.….lora_A.weight`.

    Raises:
        AdapterRefused: diffusers does not know the names.
        DataError: diffusers is not installed.
    """
    pipeline = _diffusers("loaders.lora_pipeline")
    state: dict[str, Any] = {_UNET_OF_LYCORIS.sub("lora_unet_", name): values for name, values in tensors.items()}
    loader = next((kind for kind, known in _LOADERS.items() if any(map(known.match, state))), None)
    if loader is None:
        fact = f"diffusers has no converter for names such as {next(iter(tensors))}"
        raise AdapterRefused(fact, kind="layers", hint=_KEEP)
    mixin = getattr(pipeline, f"{loader}LoraLoaderMixin")
    for name in [name for name in state if _NEEDS_ALPHA.fullmatch(name)]:
        down = state[name]
        state[name.replace(".lora_down.weight", ".alpha")] = down.new_tensor(float(len(down)))
    options = {"unet_config": _SDXL_UNET} if loader == "StableDiffusionXL" else {}
    try:
        found = mixin.lora_state_dict(state, **options)
    except (ValueError, LookupError, AssertionError, NotImplementedError, RuntimeError) as error:
        what = " ".join(str(error).split())[:300] or "its modules have other widths"
        fact = f"diffusers does not convert this adapter of {loader}: {what}"
        raise AdapterRefused(fact, kind="layers", hint=_KEEP) from error
    renamed = found[0] if isinstance(found, tuple) else found
    # Embedders of Flux come back without the component that they are in.
    return _peft_names(
        {name if _COMPONENT.match(name) else f"transformer.{name}": value for name, value in renamed.items()}
    )


def diffusers_to_kohya(tensors: Tensors, *, is_sdxl: bool) -> dict[str, Tensor]:
    """Rename factors of any of diffusers' generations to kohya's names, without alphas.

    Args:
        tensors: The factors, by their names in a file.
        is_sdxl: SDXL has two text encoders, and kohya's programs number them.

    Raises:
        AdapterRefused: diffusers has no converter for a part of them.
        DataError: diffusers is not installed.
    """
    utils = _diffusers("utils")
    named = _peft_names({name if _COMPONENT.match(name) else f"unet.{name}": one for name, one in tensors.items()})
    if odd := next((name for name in named if not re.match(r"(unet|text_encoder(_2)?)\.", name)), None):
        part = odd.partition(".")[0]
        fact = f"diffusers has no converter from {part} names to kohya names"
        raise AdapterRefused(fact, kind="layers", hint=_KEEP)
    # transformers has had this prefix in every text encoder until version 5, and kohya's programs still do.
    full = {_SHORT_TEXT.sub(r"\1text_model.", name): name for name in named}
    found: dict[str, Tensor] = utils.convert_state_dict_to_kohya({name: named[key] for name, key in full.items()})
    one_encoder = {} if is_sdxl or any(name.startswith("lora_te2_") for name in found) else {"lora_te1_": "lora_te_"}
    return {
        next((new + name.removeprefix(old) for old, new in one_encoder.items() if name.startswith(old)), name): values
        for name, values in found.items()
        if not name.endswith(".alpha")
    }


def lycoris_to_kohya(tensors: Tensors) -> dict[str, Tensor]:
    """Rename LoCon of a UNet, which differs from kohya's in a prefix alone.

    Raises:
        AdapterRefused: It is of another model.
    """
    found = {_UNET_OF_LYCORIS.sub("lora_unet_", name): values for name, values in tensors.items()}
    if odd := next((name for name in found if not name.startswith("lora_")), None):
        fact = f"{odd} is not of a UNet, whose names alone are the same in both formats"
        raise AdapterRefused(fact, kind="layers", hint=_KEEP)
    return found


def _peft_names(tensors: Tensors) -> dict[str, Tensor]:
    """Rename factors of diffusers' generations to PEFT's names."""
    utils, old = _diffusers("utils"), _diffusers("utils.state_dict_utils").StateDictType
    found: dict[str, Tensor] = {}
    for name, values in tensors.items():
        one = {name: values}
        if name.startswith("text_encoder"):
            for generation in (old.DIFFUSERS_OLD, old.DIFFUSERS):
                one = utils.convert_state_dict_to_peft(one, original_type=generation)
        else:
            one = utils.convert_unet_state_dict_to_peft(one)
        found |= one
    return found


def _diffusers(module: str) -> Any:
    from importlib import import_module

    try:
        return import_module(f"diffusers.{module}")
    except ImportError as error:
        hint = "install the extra: pip install 'icm-lora[diffusion]'"
        raise DataError("renaming image adapters needs diffusers, which is not installed", hint=hint) from error


_KEEP = "without --format it keeps its names"
