"""Load base models, generators and original adapters of a store."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from icmlora.adapter.model import Adapter
from icmlora.base_models.catalogue import modality_of
from icmlora.base_models.fingerprint import fingerprint_base
from icmlora.base_models.lookup import FoundBase, inspect_base
from icmlora.base_models.modality import BaseModel
from icmlora.errors import OutputExists
from icmlora.fleet.context import base_record, locate_base
from icmlora.formats.catalogue import format_named
from icmlora.formats.format import RunnableAdapter
from icmlora.generator.versions import GeneratorFile
from icmlora.io.devices import inference_dtype
from registry.records import AdapterRecord, GeneratorRecord

if TYPE_CHECKING:
    from icmlora.fleet.exemplars import Exemplars
    from registry.store import Store


def open_base(
    store: Store, label: str, device: torch.device, dtype: torch.dtype | None = None, *, cache: Path
) -> BaseModel:
    """Find and load a base model, and record its fingerprint and sizes in the store.

    Raises:
        BaseModelNotFound: It is not on this machine, or cannot be loaded.
        BaseModelUnsuited: It is of a kind that icm cannot run.
    """
    record = base_record(store, label)
    found = locate_base(store, label)
    stamp = found.stamp()
    known = record is not None and record.shape is not None and record.shape.get("stamp") == stamp
    fingerprint = record.fingerprint if known and record is not None else None
    base = load_base(found, device, dtype, fingerprint, cache=cache)
    if not known:
        facts = {"stamp": stamp, "hidden_size": base.hidden_size, "layers": base.layers}
        store.base_models.set_facts(label, fingerprint=base.fingerprint, shape=facts)
    return base


def load_base(
    found: FoundBase,
    device: torch.device,
    dtype: torch.dtype | None = None,
    fingerprint: str | None = None,
    *,
    cache: Path,
) -> BaseModel:
    """Load a base model that was found; its fingerprint is computed unless it is known. Raises as `open_base` does."""
    modality = modality_of(found)
    fingerprint = fingerprint or fingerprint_base(found)
    return modality.load(_converted(found, cache), device=device, dtype=dtype, fingerprint=fingerprint)


def _converted(found: FoundBase, cache: Path) -> FoundBase:
    if not found.is_gguf:
        return found
    from icmlora.base_models.gguf import convert_gguf  # imports transformers

    # Dequantising a GGUF file takes a minute, reading the result a second.
    folder = cache / "base-models" / found.stamp()[:32]
    if not (folder / "config.json").is_file():
        with suppress(OutputExists):  # another process was faster
            convert_gguf(found.path, folder, label=found.label)
    return inspect_base(found.label, Path(folder))


class Models:
    """A cache of loaded models: one generator, and one base model in the precisions that were asked for."""

    def __init__(self, store: Store, device: torch.device, cache: Path) -> None:
        self._store, self._device, self._cache = store, device, cache
        self._generator_file: GeneratorFile | None = None
        self._exemplars: tuple[int, Exemplars] | None = None
        self._bases: dict[tuple[str, torch.dtype], BaseModel] = {}

    def generator_file(self, generator: GeneratorRecord) -> GeneratorFile:
        """Return the versions of a generator. Its digest is checked when it is read."""
        if self._generator_file is None or self._generator_file.digests[-1] != generator.blob:
            self._generator_file = None
            self._generator_file = GeneratorFile(self._store.blobs.read(generator.blob))
        return self._generator_file

    def exemplars(self, generator: GeneratorRecord) -> Exemplars:
        """Return the tasks of a generator as exemplars."""
        from icmlora.fleet.exemplars import Exemplars  # most commands need none

        if self._exemplars is None or self._exemplars[0] != generator.id:
            self._exemplars = generator.id, Exemplars(self._store, generator)
        return self._exemplars[1]

    def base(self, label: str, dtype: torch.dtype | None = None) -> BaseModel:
        """Return a base model, in the given precision or in what suits the device."""
        dtype = dtype or inference_dtype(self._device)  # by name, or a card would hold two copies in one precision
        if (label, dtype) not in self._bases:
            self._bases = {key: base for key, base in self._bases.items() if key[0] == label}
            self._bases[label, dtype] = open_base(self._store, label, self._device, dtype, cache=self._cache)
        return self._bases[label, dtype]


def read_original(store: Store, final: AdapterRecord) -> Adapter:
    """Read the original of a task; alpha / rank is multiplied into its weights."""
    return format_named(final.format).read(*_files(store, final), initial=_initial(store, final)).adapter


def read_runnable(store: Store, final: AdapterRecord) -> RunnableAdapter:
    """Read the original of a task with all that changes what its base model computes."""
    return format_named(final.format).runnable(*_files(store, final), initial=_initial(store, final))


def _files(store: Store, final: AdapterRecord) -> tuple[bytes, bytes]:
    return store.blobs.read(final.config), store.blobs.read(final.weights)


def _initial(store: Store, final: AdapterRecord) -> bytes | None:
    return None if final.initial is None else store.blobs.read(final.initial)
