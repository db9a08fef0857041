"""The adapter formats that this icm reads and writes."""

from __future__ import annotations

from icmlora.errors import AdapterRefused
from icmlora.formats.format import AdapterFormat
from icmlora.formats.images.comfyui import COMFYUI
from icmlora.formats.images.diffusers import DIFFUSERS
from icmlora.formats.images.kohya import KOHYA
from icmlora.formats.images.lycoris import LYCORIS
from icmlora.formats.images.xlabs import XLABS
from icmlora.formats.pairs.gguf import GGUF
from icmlora.formats.pairs.mlx import MLX
from icmlora.formats.peft.peft import PEFT

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
