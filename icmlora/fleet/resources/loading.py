"""Load base models, generators and original adapters of a store."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from icmlora.adapter.model import Adapter
from icmlora.base_models.catalogue import modality_of
from icmlora.base_models.finding.fingerprint import fingerprint_base
from icmlora.base_models.finding.lookup import FoundBase, inspect_base
from icmlora.base_models.modality import BaseModel
from icmlora.base_models.quantised import check_load_in
from icmlora.errors import BaseModelNotFound, BaseModelUnsuited, OutputExists
from icmlora.fleet.context import OpenedGenerator, base_record, locate_base
from icmlora.formats.catalogue import format_named
from icmlora.formats.format import LoadedAdapter, RunnableAdapter
from icmlora.generator.initial_a.search import SeedSearch
from icmlora.io.devices import inference_dtype
from registry.records import AdapterRecord, GeneratorRecord

if TYPE_CHECKING:
    from icmlora.fleet.resources.recalled_code import Exemplars
    from icmlora.generator.versions import GeneratorFile
    from registry.store import Store


@dataclass(frozen=True)
class BaseFacts:
    """What a base model turned out to be when it was loaded, for the store to remember."""

    label: str
    fingerprint: str
    shape: Mapping[str, object]

    def record(self, store: Store) -> None:
        """Record them in the store."""
        store.base_models.set_facts(self.label, fingerprint=self.fingerprint, shape=self.shape)


def open_base(
    store: Store,
    label: str,
    device: torch.device,
    dtype: torch.dtype | None = None,
    *,
    cache: Path,
    on_facts: Callable[[BaseFacts], None] | None = None,
) -> BaseModel:
    """Find and load a base model, and record what the store does not know of it yet.

    Args:
        store: the store that names it.
        label: any label of it.
        device: where to load it.
        dtype: its precision; by default what suits the device.
        cache: folder for converted files.
        on_facts: what is called instead of recording, where the store is only read.

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
    """Load a base model that was found; its fingerprint is computed unless it is known. Raises as `open_base` does."""
    check_load_in(found)
    modality = modality_of(found)
    fingerprint = fingerprint or fingerprint_base(found)
    return modality.load(_converted(found, cache), device=device, dtype=dtype, fingerprint=fingerprint)


def _converted(found: FoundBase, cache: Path) -> FoundBase:
    if not found.is_gguf:
        return found
    from icmlora.base_models.load import convert_gguf  # imports transformers

    # Dequantising a GGUF file takes a minute, reading the result a second.
    folder = cache / "base-models" / found.stamp()[:32]
    if not (folder / "config.json").is_file():
        with suppress(OutputExists):  # another process was faster
            convert_gguf(found.path, folder, label=found.label)
    return inspect_base(found.label, Path(folder))


class Models:
    """A cache of loaded models of a store: one generator, and one base model in the precisions that were asked for.

    `seeds` remembers draws: most of the second that the first search for a seed takes is spent on them.
    """

    def __init__(
        self, store: Store, device: torch.device, cache: Path, on_facts: Callable[[BaseFacts], None] | None = None
    ) -> None:
        self.store, self.device = store, device
        self.seeds = SeedSearch()
        self._cache, self._on_facts = cache, on_facts
        self._generator = OpenedGenerator()
        self._exemplars: tuple[int, Exemplars] | None = None
        self._bases: dict[tuple[str, torch.dtype], BaseModel | BaseModelNotFound | BaseModelUnsuited] = {}

    def generator_file(self, generator: GeneratorRecord) -> GeneratorFile:
        """Return the versions of a generator. Its digest is checked when it is read."""
        return self._generator.get(generator.blob, self.store.blobs.read)

    def exemplars(self, generator: GeneratorRecord) -> Exemplars:
        """Return the tasks of a generator as exemplars."""
        from icmlora.fleet.resources.recalled_code import Exemplars  # most commands need none

        if self._exemplars is None or self._exemplars[0] != generator.id:
            self._exemplars = generator.id, Exemplars(self.store, generator)
        return self._exemplars[1]

    def base(self, label: str, dtype: torch.dtype | None = None) -> BaseModel:
        """Return a base model, in the given precision or in what suits the device. Raises as `open_base` does."""
        known = self.loaded(label)
        if known is not None and known.load_in is not None:
            return known  # it has one precision, whatever is asked for
        dtype = dtype or inference_dtype(self.device)  # by name, or a card would hold two copies in one precision
        if (label, dtype) not in self._bases:
            self._bases = {key: base for key, base in self._bases.items() if key[0] == label}
            self._bases[label, dtype] = self._opened(label, dtype)
        base = self._bases[label, dtype]
        if isinstance(base, BaseModelNotFound | BaseModelUnsuited):
            raise base
        return base

    def loaded(self, label: str) -> BaseModel | None:
        """Return a base model, in whatever precision, if it was loaded."""
        found = (base for (name, _), base in self._bases.items() if name == label and isinstance(base, BaseModel))
        return next(found, None)

    def _opened(self, label: str, dtype: torch.dtype | None) -> BaseModel | BaseModelNotFound | BaseModelUnsuited:
        """Load a base model. That it cannot be loaded is remembered too: a thousand tasks may ask for it."""
        try:
            return open_base(self.store, label, self.device, dtype, cache=self._cache, on_facts=self._on_facts)
        except (BaseModelNotFound, BaseModelUnsuited) as error:
            return error


def read_original(store: Store, final: AdapterRecord) -> Adapter:
    """Read the original of a task, alpha / rank multiplied into B; raises `AdapterRefused` or `DamagedStore`."""
    return original_reader(store, final)()


def original_reader(store: Store, final: AdapterRecord) -> Callable[[], Adapter]:
    """Read the files of a task's original, and return what makes its adapter, on any thread."""
    known, files, initial = format_named(final.format), _files(store, final), _initial(store, final)
    return lambda: known.read(*files, initial=initial).adapter


def read_with_extras(store: Store, final: AdapterRecord) -> LoadedAdapter:
    """Read the original of a task with the tensors that a code cannot represent, as its own file has them."""
    return format_named(final.format).read(*_files(store, final), initial=_initial(store, final))


def read_runnable(store: Store, final: AdapterRecord) -> RunnableAdapter:
    """Read the original of a task with all that changes what its base model computes."""
    return format_named(final.format).runnable(*_files(store, final), initial=_initial(store, final))


def _files(store: Store, final: AdapterRecord) -> tuple[bytes, bytes]:
    return store.blobs.read(final.config), store.blobs.read(final.weights)


def _initial(store: Store, final: AdapterRecord) -> bytes | None:
    return None if final.initial is None else store.blobs.read(final.initial)
