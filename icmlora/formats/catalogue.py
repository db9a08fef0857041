"""The adapter formats that this icm reads and writes: one line for each."""

from __future__ import annotations

from icmlora.errors import AdapterRefused
from icmlora.formats.format import AdapterFormat
from icmlora.formats.gguf_format import GgufFormat
from icmlora.formats.mlx_format import MlxFormat
from icmlora.formats.peft import PeftFormat

FORMATS: list[AdapterFormat] = [
    PeftFormat(),
    MlxFormat(),
    GgufFormat(),
]


def format_named(name: str) -> AdapterFormat:
    """Return the format of a name."""
    for known in FORMATS:
        if known.name == name:
            return known
    hint = "use the icm that ingested the adapter, or a newer one"
    raise AdapterRefused(f"this icm does not know the adapter format {name!r}", kind="format", hint=hint)
