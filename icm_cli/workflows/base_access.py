"""Load the base model that a fleet needs, from wherever it is on this machine."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from icm_cli.config import cache_folder
from icmlora.base_lookup import FoundBase, find_base_model, inspect_base
from icmlora.base_model import BaseModel, load_base_model
from icmlora.errors import OutputExists
from icmlora.fingerprint import fingerprint_base
from icmlora.gguf_base import convert_gguf
from registry.records import BaseModelRecord

if TYPE_CHECKING:
    from registry.store import Store


def open_base(store: Store, label: str, device: torch.device, dtype: torch.dtype | None = None) -> BaseModel:
    """Find and load a base model, and note in the store what it is.

    A GGUF file is dequantised once into the cache: reading it takes a minute, reading the result a second.

    Args:
        store: The open store; its aliases come first.
        label: The name that adapters give the base model.
        device: Where to put it.
        dtype: Precision; what suits the device by default.

    Raises:
        BaseModelNotFound: There is no local copy, or it cannot be loaded.
    """
    record = _record(store, label)
    found = locate_base(store, label)
    stamp = found.stamp()
    known = record is not None and record.shape is not None and record.shape.get("stamp") == stamp
    fingerprint = record.fingerprint if known and record is not None else None
    fingerprint = fingerprint or fingerprint_base(found)
    base = load_base_model(_readable(found, stamp), device=device, dtype=dtype, fingerprint=fingerprint)
    if not known:
        facts = {"stamp": stamp, "hidden_size": base.hidden_size, "layers": base.layers}
        store.set_base_facts(label, fingerprint=fingerprint, shape=facts)
    return base


def locate_base(store: Store, label: str) -> FoundBase:
    """Find a base model without loading it.

    Raises:
        BaseModelNotFound: There is no local copy.
    """
    record = _record(store, label)
    aliases = {label: record.path} if record is not None and record.path is not None else {}
    return find_base_model(label, aliases=aliases)


def _record(store: Store, label: str) -> BaseModelRecord | None:
    return next((known for known in store.base_models() if known.name == label), None)


def _readable(found: FoundBase, stamp: str) -> FoundBase:
    if not found.is_gguf:
        return found
    folder = cache_folder() / "base-models" / stamp[:32]
    if not (folder / "config.json").is_file():
        with suppress(OutputExists):  # another icm was faster
            convert_gguf(found.path, folder, label=found.label)
    return inspect_base(found.label, Path(folder))
