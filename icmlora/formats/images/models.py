"""Which base model an image adapter is for: its header says it, or else the names of its blocks, or else their widths.

Adapters of one architecture fit all of its checkpoints, so the label is that of the architecture, as the modelspec
standard spells it where it has one (github.com/Stability-AI/ModelSpec). On which checkpoint it was trained stays in its
metadata.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import NamedTuple

from icmlora.formats.images.families import (
    Family,
    families_like,
    families_with,
    guessed_label,
    inner_name,
    label_of_names,
    stated_label,
)

# modelspec has the label, then the kind of adapter: `.../lora`.
_STATED = ("modelspec.architecture", "ss_base_model_version")
_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,80}")
_UNSET = frozenset({"None", "none", "null", "unknown"})
# Two text encoders of CLIP beside a UNet: SDXL alone has them.
_SECOND_TEXT, _ANY_UNET = re.compile(r"lora_te2_|text_encoder_2\."), re.compile(r"lora_unet_|unet\.")
_CLIP = re.compile(r"lora_te\d?_text_model|text_encoder(_\d)?\.(text_model|encoder)|(text_encoders\.)?clip_")
_SDXL = "stable-diffusion-xl-v1-base"
_NUMBER = re.compile(r"\d+")


class ImageBase(NamedTuple):
    """The base model of an image adapter.

    Attributes:
        label: What it is called; None if nothing tells.
        is_guess: Only widths tell, which other models may have too.
    """

    label: str | None
    is_guess: bool = False


UNKNOWN = ImageBase(None)


def base_of(metadata: Mapping[str, str], widths: Mapping[str, int]) -> ImageBase:
    """Return the base model of an adapter.

    Args:
        metadata: That of its header.
        widths: Its modules in natural order, as its file calls them -> the width that each reads, or 0 where that is
            not known.
    """
    # One module of each kind is enough, which is the last: models have thousands, and differ in how many blocks.
    kinds = {_NUMBER.sub("#", name): (name, width) for name, width in map(_inner, widths.items())}
    inner = dict(kinds.values())
    for key in _STATED:
        text = metadata.get(key, "").partition("/")[0]
        if _LABEL.fullmatch(text) and text not in _UNSET:
            return ImageBase(stated_label(text, inner) or text)
    if (label := label_of_names(inner)) is not None:
        return ImageBase(label)
    guessed = guessed_label(inner, with_clip=any(map(_CLIP.match, widths)))
    if guessed in (None, _SDXL) and all(any(map(one.match, widths)) for one in (_ANY_UNET, _SECOND_TEXT)):
        return ImageBase(_SDXL)
    return ImageBase(guessed, is_guess=guessed is not None)


def families_of(names: Collection[str], base: ImageBase) -> list[Family]:
    """Return the families that an adapter may be of, the likeliest first: one where its base model is certain.

    Args:
        names: Its modules, without their prefixes.
        base: What is known of its base model.
    """
    known = families_with(base.label)
    if known and not base.is_guess:
        return known
    return list(dict.fromkeys([*known, *families_like(names)]))


def _inner(item: tuple[str, int]) -> tuple[str, int]:
    return inner_name(item[0]), item[1]
