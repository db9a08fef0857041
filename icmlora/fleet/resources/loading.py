"""Load base models, generators and original adapters of a store."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from icmlora.adapter.model import Adapter
from icmlora.base_models.catalogue import modality_of
from icmlora.base_models.finding.fingerprint import fingerprint_base
from icmlora.base_models.finding.lookup import FoundBase, check_load_in, inspect_base
from icmlora.base_models.modality import BaseModel
from icmlora.errors import BaseModelNotFound, BaseModelUnsuited, OutputExists
from icmlora.fleet.context import GeneratorCache, locate_base
from icmlora.formats.catalogue import format_named
from icmlora.formats.format import LoadedAdapter, RunnableAdapter
from icmlora.generator.initial_a.search import SeedSearch
from icmlora.io.devices import inference_dtype
from registry.manifests import StoredAdapter

if TYPE_CHECKING:
    from icmlora.fleet.resources.recalled_code import Exemplars
    from icmlora.generator.codec.generator_file import GeneratorFile
    from registry.store import Store


@dataclass(frozen=True)
class BaseFacts:
    """Fingerprint and shape of a loaded base model, to be recorded."""

    label: str
    fingerprint: str
    shape: Mapping[str, object]

    def record(self, store: Store) -> None:
        """Record them in the store."""
        store.update_base(self.label, lambda base: replace(base, fingerprint=self.fingerprint, shape=self.shape))


def open_base(
    store: Store,
    label: str,
    device: torch.device,
    dtype: torch.dtype | None = None,
    *,
    cache: Path,
    on_facts: Callable[[BaseFacts], None] | None = None,
) -> BaseModel:
    """Find and load a base model of a store, and record its fingerprint and shape.

    Args:
        store: The store.
        label: Any label of the base model.
        device: Where to load it.
        dtype: Its precision; by default what suits the device.
        cache: Folder for converted files.
        on_facts: Called instead of recording, for a read-only store.

    Raises:
        BaseModelNotFound: It is not on this machine, or cannot be loaded.
        BaseModelUnsuited: icm cannot run this kind of model.
    """
    known, found = store.base_model(label), locate_base(store, label)
    stamp = found.stamp()
    is_known = known.shape is not None and known.shape.get("stamp") == stamp
    base = load_base(found, device, dtype, known.fingerprint if is_known else None, cache=cache)
    if not is_known:
        shape = {"stamp": stamp, "hidden_size": base.hidden_size, "layers": base.layers}
        facts = BaseFacts(label, base.fingerprint, shape)
        facts.record(store) if on_facts is None else on_facts(facts)
    return base


def load_base(
    found: FoundBase,
    device: torch.device,
    dtype: torch.dtype | None = None,
    fingerprint: str | None = None,
    *,
    cache: Path,
) -> BaseModel:
    """Load a base model; its fingerprint is computed unless it is known. Raises as `open_base` does."""
    check_load_in(found)
    modality = modality_of(found)
    fingerprint = fingerprint or fingerprint_base(found)
    if found.is_gguf:
        from icmlora.base_models.load import convert_gguf  # imports transformers

        # Dequantising a GGUF file takes a minute, reading the result a second.
        folder = cache / "base-models" / found.stamp()[:32]
        if not (folder / "config.json").is_file():
            with suppress(OutputExists):  # another process was faster
                convert_gguf(found.path, folder, label=found.label)
        found = inspect_base(found.label, folder)
    return modality.load(found, device=device, dtype=dtype, fingerprint=fingerprint)


class ModelCache:
    """The loaded models of a store: one generator, and one base model in each precision asked for.

    `seeds` remembers draws, which take most of the second of the first search for a seed.
    """

    def __init__(
        self, store: Store, device: torch.device, cache: Path, on_facts: Callable[[BaseFacts], None] | None = None
    ) -> None:
        self.store, self.device = store, device
        self.seeds = SeedSearch()
        self._cache, self._on_facts = cache, on_facts
        self._generator = GeneratorCache()
        self._exemplars: tuple[str, Exemplars] | None = None
        self._bases: dict[tuple[str, torch.dtype], BaseModel | BaseModelNotFound | BaseModelUnsuited] = {}

    def generator_file(self, digest: str) -> GeneratorFile:
        """Return the networks of a generator after checking its digest."""
        return self._generator.get(digest, self.store.blobs.read)

    def exemplars(self, base_model: str) -> Exemplars:
        """Return the tasks of a base model as exemplars."""
        from icmlora.fleet.resources.recalled_code import Exemplars  # most commands need none

        if self._exemplars is None or self._exemplars[0] != base_model:
            self._exemplars = base_model, Exemplars(self.store, base_model)
        return self._exemplars[1]

    def base(self, label: str, dtype: torch.dtype | None = None) -> BaseModel:
        """Return a base model in the given precision, or in what suits the device. Raises as `open_base` does."""
        known = self.loaded(label)
        if known is not None and known.load_in is not None:
            return known  # it has only one precision
        dtype = dtype or inference_dtype(self.device)  # by name, or a card would hold two copies in one precision
        if (label, dtype) not in self._bases:
            self._bases = {key: base for key, base in self._bases.items() if key[0] == label}
            try:
                base = open_base(self.store, label, self.device, dtype, cache=self._cache, on_facts=self._on_facts)
                self._bases[label, dtype] = base
            except (BaseModelNotFound, BaseModelUnsuited) as error:  # kept: a thousand tasks may ask for it
                self._bases[label, dtype] = error
        found = self._bases[label, dtype]
        if isinstance(found, BaseModelNotFound | BaseModelUnsuited):
            raise found
        return found

    def loaded(self, label: str) -> BaseModel | None:
        """Return a base model in any precision, if it was loaded."""
        found = (base for (name, _), base in self._bases.items() if name == label and isinstance(base, BaseModel))
        return next(found, None)


def read_original(store: Store, final: StoredAdapter) -> Adapter:
    """Read an original, alpha / rank multiplied into B; raises `AdapterRefused` or `DamagedStore`."""
    return original_reader(store, final)()


def original_reader(store: Store, final: StoredAdapter) -> Callable[[], Adapter]:
    """Read the files of an original, and return a function that parses them on any thread."""
    known, (config, weights, initial) = format_named(final.format), _files(store, final)
    return lambda: known.read(config, weights, initial=initial).adapter


def read_with_extras(store: Store, final: StoredAdapter) -> LoadedAdapter:
    """Read an original with the tensors that a code cannot represent, as its own file has them."""
    config, weights, initial = _files(store, final)
    return format_named(final.format).read(config, weights, initial=initial)


def read_runnable(store: Store, final: StoredAdapter) -> RunnableAdapter:
    """Read an original with everything that changes its base model's output."""
    config, weights, initial = _files(store, final)
    return format_named(final.format).runnable(config, weights, initial=initial)


def _files(store: Store, final: StoredAdapter) -> tuple[bytes, bytes, bytes | None]:
    read = store.blobs.read
    return read(final.config), read(final.weights), None if final.initial is None else read(final.initial)
