"""Load what a store holds or names: base models, generators, original adapters."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from icmlora.adapter.model import Adapter
from icmlora.base_models.catalogue import modality_of
from icmlora.base_models.gguf import convert_gguf
from icmlora.base_models.lookup import FoundBase, fingerprint_base, inspect_base
from icmlora.base_models.modality import BaseModel
from icmlora.errors import OutputExists
from icmlora.fleet.context import base_record, locate_base
from icmlora.formats.catalogue import format_named
from icmlora.formats.peft import save_adapter
from icmlora.generator.versions import GeneratorFile
from registry.records import AdapterRecord, GeneratorRecord

if TYPE_CHECKING:
    from registry.store import Store


def open_base(
    store: Store, label: str, device: torch.device, dtype: torch.dtype | None = None, *, cache: Path
) -> BaseModel:
    """Find and load a base model, and note in the store what it is.

    A GGUF file is dequantised once into the cache: reading it takes a minute, reading the result a second.

    Args:
        store: The open store; its aliases come first.
        label: The name that adapters give the base model.
        device: Where to put it.
        dtype: Precision; what suits the device by default.
        cache: Where a GGUF file is converted to.

    Raises:
        BaseModelNotFound: There is no local copy, or it cannot be loaded.
    """
    record = base_record(store, label)
    found = locate_base(store, label)
    stamp = found.stamp()
    known = record is not None and record.shape is not None and record.shape.get("stamp") == stamp
    fingerprint = record.fingerprint if known and record is not None else None
    fingerprint = fingerprint or fingerprint_base(found)
    readable = _readable(found, stamp, cache)
    base = modality_of(readable).load(readable, device=device, dtype=dtype, fingerprint=fingerprint)
    if not known:
        facts = {"stamp": stamp, "hidden_size": base.hidden_size, "layers": base.layers}
        store.base_models.set_facts(label, fingerprint=fingerprint, shape=facts)
    return base


def _readable(found: FoundBase, stamp: str, cache: Path) -> FoundBase:
    if not found.is_gguf:
        return found
    folder = cache / "base-models" / stamp[:32]
    if not (folder / "config.json").is_file():
        with suppress(OutputExists):  # another icm was faster
            convert_gguf(found.path, folder, label=found.label)
    return inspect_base(found.label, Path(folder))


class Models:
    """Loads on demand, and lets go of a base model once another one is asked for.

    Args:
        store: The open store.
        device: Where base models go.
        cache: Where base models are converted to.
    """

    def __init__(self, store: Store, device: torch.device, cache: Path) -> None:
        self._store, self._device, self._cache = store, device, cache
        self._generator_file: GeneratorFile | None = None
        self._bases: dict[tuple[str, torch.dtype | None], BaseModel] = {}

    def generator_file(self, generator: GeneratorRecord) -> GeneratorFile:
        """Return the versions of a generator, whose digest is checked when it is read.

        Raises:
            DamagedStore: Its bytes are not those that were stored.
            GeneratorError: It cannot be opened.
        """
        if self._generator_file is None or self._generator_file.digests[-1] != generator.blob:
            self._generator_file = None
            self._generator_file = GeneratorFile(self._store.blobs.read(generator.blob))
        return self._generator_file

    def base(self, label: str, dtype: torch.dtype | None = None) -> BaseModel:
        """Return a base model, in what suits the device or in a precision of its own.

        Raises:
            BaseModelNotFound: There is no local copy.
        """
        if (label, dtype) not in self._bases:
            self._bases = {key: base for key, base in self._bases.items() if key[0] == label}
            self._bases[label, dtype] = open_base(self._store, label, self._device, dtype, cache=self._cache)
        return self._bases[label, dtype]


def read_original(store: Store, final: AdapterRecord) -> Adapter:
    """Read an original with its scale folded in."""
    found = format_named(final.format).read(store.blobs.read(final.config), store.blobs.read(final.weights))
    return found.adapter


def write_plain_copy(store: Store, final: AdapterRecord, folder: Path) -> None:
    """Write an original for PEFT to load here.

    PEFT runs the patterns of a configuration as regular expressions, and one from outside may never end. The copy
    names its modules literally; in float32 its weights, scale included, are those of the original.
    """
    save_adapter(read_original(store, final), folder, dtype="float32", card="", metadata={})
