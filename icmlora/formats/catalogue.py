"""The adapter formats that this icm reads and writes: one line for each, loaded when somebody asks for it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from importlib import import_module

from icmlora.errors import AdapterRefused
from icmlora.formats.format import AdapterFormat

# `diffusers` is `DIFFUSERS` in icmlora/formats/images/diffusers.py. The first that finds an adapter has it: LyCORIS comes
# before kohya, whose names it shares.
FORMATS: list[str | AdapterFormat] = ["peft", "mlx", "gguf", "diffusers", "comfyui", "xlabs", "lycoris", "kohya"]
"""Names of formats, or formats themselves."""


def formats() -> Iterator[AdapterFormat]:
    """Yield every format, in the order in which they look for adapters."""
    return (_load(known) if isinstance(known, str) else known for known in FORMATS)


def format_named(name: str) -> AdapterFormat:
    """Return the format of a name."""
    for known in FORMATS:
        if known == name:
            return _load(name)
        if not isinstance(known, str) and known.name == name:
            return known
    hint = "use the icm that ingested the adapter, or a newer one"
    raise AdapterRefused(f"this icm does not know the adapter format {name!r}", kind="format", hint=hint)


@cache
def _load(name: str) -> AdapterFormat:
    found: AdapterFormat = getattr(import_module(f"icmlora.formats.{name}"), name.upper())
    return found
