"""Rename the tensors of image adapters between formats, checked against the models of diffusers.

    any program's ──names of diffusers' model, flattened or not──▶ transformer.….lora_A.weight
    any program's ──diffusers' converter of the model's family───▶ transformer.….lora_A.weight
    diffusers' ──convert_*_to_peft──▶ unet.….lora_A.weight ──convert_state_dict_to_kohya──▶ lora_unet_….lora_down.weight

Every new name must be a module of the model. Fused layers are split into several layers, with parts of the same
tensors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from icmlora.errors import AdapterRefused
from icmlora.formats.images.converters import CONVERTERS, REFUSALS
from icmlora.formats.images.diffusers_models import clip_name, from_diffusers, modules_of
from icmlora.formats.images.families import FAMILIES, UNET, UNKNOWN, Family, ImageBase, families_of, inner_name

if TYPE_CHECKING:
    from torch import Tensor

    from icmlora.formats.images.converters import Pairs

Tensors = Mapping[str, "Tensor"]

_HALVES = (
    re.compile(r"(?P<stem>.+?)\.(lora_A(\.default)?|lora_down|lora\.down|down)\.weight"),
    re.compile(r"(?P<stem>.+?)\.(lora_B(\.default)?|lora_up|lora\.up|up)\.weight"),
)
# DiffSynth stores the rows of MiniMax-H3's fused layers head by head, detectable only by its spelling.
_BY_HEADS = re.compile(r"(.+\.)?blocks\.\d+\.attn\.qkv_proj\.lora_B\.default\.weight")
_COMPONENT = re.compile(r"(unet|transformer(_\d)?|text_encoder(_\d)?)\.")
# Prefixes of CLIP text encoders. All others are T5 or language models; diffusers loads no adapters into them.
_TEXT: Mapping[re.Pattern[str], str] = {
    re.compile(r"lora_te1?_|(text_encoders\.)?clip_l\.(transformer\.)?|text_encoder(_1)?\."): "text_encoder",
    re.compile(r"lora_te2_|(text_encoders\.)?clip_g\.(transformer\.)?|text_encoder_2\."): "text_encoder_2",
}
_ANY_TEXT = re.compile(r"lora_te\d?_|text_encoder|clip_|t5xxl|conditioner")
_SHORT_TEXT = re.compile(r"^(text_encoder(?:_2)?\.)(?!text_model\.|text_projection)")
_UNET_OF_LYCORIS = re.compile(r"lycoris_(?=(down_blocks|mid_block|up_blocks|conv_in|conv_out|time_embedding)_)")
_UNETS = tuple(family for family in FAMILIES if family.model == UNET)


def to_diffusers(tensors: Tensors, base: ImageBase = UNKNOWN) -> dict[str, Tensor]:
    """Rename factors with alpha = r to diffusers' current names, `unet.….lora_A.weight`.

    Args:
        tensors: The factors, by their names in a file.
        base: The base model, if known.

    Raises:
        AdapterRefused: diffusers does not know the names, or its model has no such modules.
        DataError: diffusers is not installed.
    """
    from_diffusers()
    pairs = _paired(tensors)
    text = {stem: pair for stem, pair in pairs.items() if _ANY_TEXT.match(stem)}
    rest = {stem: pair for stem, pair in pairs.items() if stem not in text}
    families = families_of([inner_name(stem) for stem in rest], base)
    if not families and not rest:
        families = list(_UNETS)
    refused: AdapterRefused | None = None
    for family in families:
        try:
            return _renamed(rest, family) | _renamed_text(text, family)
        except AdapterRefused as error:
            refused = refused or error
    if refused is None:
        fact = f"diffusers has no converter for names such as {next(iter(tensors))}"
        refused = AdapterRefused(fact, kind="layers", hint=_KEEP)
    raise refused


def diffusers_to_kohya(tensors: Tensors, *, is_sdxl: bool) -> dict[str, Tensor]:
    """Rename factors from any generation of diffusers' names to kohya's names, without alphas.

    Args:
        tensors: The factors, by their names in a file.
        is_sdxl: SDXL has two text encoders, and kohya's programs number them.

    Raises:
        AdapterRefused: diffusers has no converter for a part, or its models have no such modules.
        DataError: diffusers is not installed.
    """
    utils = from_diffusers("utils")
    named = _peft_names({name if _COMPONENT.match(name) else f"unet.{name}": one for name, one in tensors.items()})
    for name in named:
        part, _, inner = name.partition(".")
        if part not in ("unet", "text_encoder", "text_encoder_2"):
            fact = f"diffusers has no converter from {part} names to kohya names"
            raise AdapterRefused(fact, kind="layers", hint=_KEEP)
        module = inner.partition(".lora_")[0]
        if (_unet_name(module) if part == "unet" else clip_name(module)) is None:
            raise _lost(f"{part}.{module}", f"{'Stable Diffusion' if part == 'unet' else 'CLIP'} has no such module")
    # transformers used this prefix in every text encoder until version 5, and kohya's programs still do.
    full = {_SHORT_TEXT.sub(r"\1text_model.", name): name for name in named}
    found: dict[str, Tensor] = utils.convert_state_dict_to_kohya({name: named[key] for name, key in full.items()})
    one_encoder = {} if is_sdxl or any(name.startswith("lora_te2_") for name in found) else {"lora_te1_": "lora_te_"}
    return {
        next((new + name.removeprefix(old) for old, new in one_encoder.items() if name.startswith(old)), name): values
        for name, values in found.items()
        if not name.endswith(".alpha")
    }


def lycoris_to_kohya(tensors: Tensors) -> dict[str, Tensor]:
    """Rename LoCon of a UNet, which differs from kohya's names only in a prefix.

    Raises:
        AdapterRefused: A module is not in a UNet.
        DataError: diffusers is not installed.
    """
    found = {_UNET_OF_LYCORIS.sub("lora_unet_", name): values for name, values in tensors.items()}
    for name in found:
        stem = name.partition(".")[0]
        known = stem.startswith("lora_") and (not stem.startswith("lora_unet_") or _unet_name(inner_name(stem)))
        if not known:
            fact = f"{name} is not in a UNet, and only UNet names are the same in both formats"
            raise AdapterRefused(fact, kind="layers", hint=_KEEP)
    return found


def _paired(tensors: Tensors) -> Pairs:
    """Return A and B of each module, by its name in the file."""
    halves: dict[str, dict[int, Tensor]] = {}
    for name, values in tensors.items():
        if _BY_HEADS.fullmatch(name):
            fact = f"{name} has its rows in DiffSynth's order; diffusers loads such a file, but icm does not convert it"
            raise AdapterRefused(fact, kind="layers", hint=_KEEP)
        for half, pattern in enumerate(_HALVES):
            if (match := pattern.fullmatch(name)) is not None:
                halves.setdefault(match["stem"], {})[half] = values
                break
        else:
            raise _lost(name, "it is not a LoRA factor")
    return {stem: (pair[0], pair[1]) for stem, pair in halves.items()}


def _renamed(pairs: Pairs, family: Family) -> dict[str, Tensor]:
    """Rename the factors of the UNet or transformer."""
    if not pairs:
        return {}
    if family.model is None:
        fact = f"adapters of {family.label} are not converted: {family.refusal}"
        raise AdapterRefused(fact, kind="layers", hint=_KEEP)
    modules = modules_of(family)
    names = {stem: modules.find(inner_name(stem)) for stem in pairs}
    if all(names.values()):
        return {
            f"{_component(stem, family)}.{names[stem]}.lora_{half}.weight": values
            for stem, pair in pairs.items()
            for half, values in zip("AB", pair, strict=True)
        }
    odd = next(stem for stem, name in names.items() if name is None)
    converter = CONVERTERS.get(family.label)
    if converter is None:
        raise _lost(odd, f"diffusers' {family.model} has no such module")
    try:
        found = converter(pairs)
    except REFUSALS as error:
        what = " ".join(str(error).split())[:300] or "the widths of its modules differ"
        fact = f"diffusers does not convert this adapter of {family.label}: {what}"
        raise AdapterRefused(fact, kind="layers", hint=_KEEP) from error
    return {_checked(name, family): values for name, values in _peft_names(found).items()}


def _component(stem: str, family: Family) -> str:
    """Return the pipeline component that contains a module; Wan 2.2 has two transformers."""
    match = _COMPONENT.match(stem)
    return match[1] if match is not None and match[1].startswith(family.component) else family.component


def _checked(name: str, family: Family) -> str:
    """Return a converted name with its component; refuse it if the model has no such module."""
    name = name if _COMPONENT.match(name) else f"{family.component}.{name}"  # Flux's embedders lack the component
    module, _, half = name.partition(".")[2].rpartition(".lora_")
    if half not in ("A.weight", "B.weight") or modules_of(family).find(module) != module:
        fact = f"diffusers converts a part of it to {name}, but its {family.model} has no such module"
        raise AdapterRefused(fact, kind="layers", hint=_KEEP)
    return name


def _renamed_text(pairs: Pairs, family: Family) -> dict[str, Tensor]:
    """Rename the factors of text encoders."""
    known = ("text_encoder", "text_encoder_2")[: family.text_encoders]
    found: dict[str, Tensor] = {}
    for stem, pair in pairs.items():
        place = next(((match.end(), part) for one, part in _TEXT.items() if (match := one.match(stem))), None)
        name = clip_name(stem[place[0] :]) if place is not None and place[1] in known else None
        if place is None or name is None:
            into = f"adapters only into CLIP, the {' and the '.join(known)}" if known else "none into the text encoders"
            raise _lost(stem, f"diffusers loads {into} of {family.label}")
        for half, values in zip("AB", pair, strict=True):
            found[f"{place[1]}.{name}.lora_{half}.weight"] = values
    return found


def _unet_name(module: str) -> str | None:
    return next((name for family in _UNETS if (name := modules_of(family).find(module)) is not None), None)


def _peft_names(tensors: Tensors) -> dict[str, Tensor]:
    """Rename factors from any generation of diffusers' names to PEFT's names."""
    utils, old = from_diffusers("utils"), from_diffusers("utils.state_dict_utils").StateDictType
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


def _lost(module: str, why: str) -> AdapterRefused:
    fact = f"diffusers has no converter for {module}: it would be lost ({why})"
    return AdapterRefused(fact, kind="layers", hint=_KEEP)


_KEEP = "leave out --format to keep its names"
