"""The adapter formats that this icm reads and writes, and the only access to the formats of image models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from icmlora.errors import AdapterRefused
from icmlora.formats.format import AdapterBytes, AdapterFormat
from icmlora.formats.images.comfyui import COMFYUI
from icmlora.formats.images.diffusers import DIFFUSERS
from icmlora.formats.images.kohya import KOHYA
from icmlora.formats.images.lycoris import LYCORIS
from icmlora.formats.images.xlabs import XLABS
from icmlora.formats.pairs.gguf import GGUF
from icmlora.formats.pairs.mlx import MLX
from icmlora.formats.peft.peft import PEFT

if TYPE_CHECKING:
    from icmlora.formats.images.lycoris_lora import LowRank

FORMATS: list[AdapterFormat] = [PEFT, MLX, GGUF, DIFFUSERS, COMFYUI, XLABS, LYCORIS, KOHYA]
"""The first format that finds an adapter wins: LyCORIS precedes kohya, whose names it shares."""


def format_named(name: str) -> AdapterFormat:
    """Return the format of a name.

    Raises:
        AdapterRefused: This icm does not know it.
    """
    for known in FORMATS:
        if known.name == name:
            return known
    hint = "use the icm version that ingested the adapter, or a newer one"
    raise AdapterRefused(f"this icm does not support the adapter format {name!r}", kind="format", hint=hint)


def convert_image(
    content: AdapterBytes, source: AdapterFormat, target: AdapterFormat, *, metadata: Mapping[str, str], dtype: str
) -> AdapterBytes:
    """Convert an image adapter to another format; see `images.conversion.convert_image`."""
    from icmlora.formats.images import conversion  # imports torch

    return conversion.convert_image(content, source, target, metadata=metadata, dtype=dtype)


def check_image_names(weights: bytes, source: AdapterFormat, target: AdapterFormat) -> None:
    """Refuse an image adapter with names that have no equivalent in another format, before its values are read."""
    from icmlora.formats.images import conversion

    conversion.checked_renaming(weights, source, target)


def lycoris_to_lora(weights: bytes, rank: int) -> LowRank:
    """Return the closest LoRA to an adapter of another method; see `images.lycoris_lora.low_rank`."""
    from icmlora.formats.images import lycoris_lora

    return lycoris_lora.low_rank(weights, rank)


def format_of_lora(weights: bytes) -> AdapterFormat:
    """Return the format of the result of `lycoris_to_lora`."""
    from icmlora.formats.images import lycoris_lora

    return format_named(lycoris_lora.format_of_lora(weights))
