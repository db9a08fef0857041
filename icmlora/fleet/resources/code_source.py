"""Read tasks and codes from an open store, or from an open bundle as if it had been imported. Never imports torch.

The quality that a bundle states for its codes is a claim: nothing here has measured it.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, TypeAlias

from icmlora.base_models.finding.lookup import FoundBase, find_base_model
from icmlora.base_models.finding.tensors import BaseTensors, needed_tensors
from icmlora.bundle.file import BundleFile
from icmlora.bundle.index import BundleIndex
from icmlora.errors import BaseModelNotFound, BundleError, DataError
from icmlora.fleet.context import Context, has_loaders, locate_base
from icmlora.formats.catalogue import format_named
from icmlora.formats.format import check_companions
from registry.filters import Selection
from registry.manifests import Generator, Task
from registry.names import LOAD_IN, bundle_source

if TYPE_CHECKING:
    import torch

    from icmlora.adapter.model import Adapter
    from icmlora.base_models.modality import BaseModel
    from icmlora.fleet.resources.decoding import OriginalForm
    from icmlora.fleet.resources.stored_vectors import ComparableVectors
    from icmlora.generator.codec.generator_file import GeneratorFile
    from registry.store import Store

Decoded = Literal["code", "recalled", "network"]
CodeSource: TypeAlias = "StoreCodes | BundleCodes"


class AdapterParts(Protocol):
    """The parts of a task's adapter: bytes that its manifest names, and the generator of its code."""

    better: str  # how to get better codes, as a hint
    takes_claims: bool  # whether error limits apply to the errors that a bundle claims

    def version_of(self, generator: str, base_model: str) -> int | None:
        """Return the version of the generator with a network; None if it is not known."""

    def read(self, digest: str) -> bytes:
        """Return verified bytes."""

    def generator_file(self, generator: str) -> GeneratorFile:
        """Open a generator by its digest; raise if a part of it is damaged."""

    def form(self, task: Task) -> OriginalForm:
        """Read the form and the extras of an original, whose weights may be missing."""

    def predict(self, task: Task, seed: int | None) -> Adapter:
        """Predict the adapter of a task from its vectors with the network alone."""


@contextmanager
def open_codes(
    context: Context, *, read_only: bool = True, base_model: str | Path | None = None, loader: str | None = None
) -> Iterator[CodeSource]:
    """Open the bundle of a context, or else its store.

    Args:
        context: The store or the bundle.
        read_only: Whether to open the store for reading only.
        base_model: The folder or file of a bundle's base model; by default it is searched for in the Hugging Face
            cache.
        loader: `MODULE:FUNCTION` that loads a bundle's base model, for models outside transformers.

    Raises:
        BundleError: The bundle is damaged, or the file was replaced.
    """
    if context.bundle is None:
        with context.open(read_only=read_only) as store:
            yield StoreCodes(store, context)
    else:
        with context.bundle.open() as file:
            yield BundleCodes(file, context, base_model, loader)


class StoreCodes:
    """The codes of an open store."""

    name = "store"
    better = (
        "use `--source original` for the exact adapter, or run `icm train` with a higher --quality for better codes"
    )
    takes_claims = False

    def __init__(self, store: Store, context: Context) -> None:
        self.store, self._context, self.generator_cache = store, context, context.generator
        self.find, self.get, self.current, self.read = store.find, store.task, store.generator, store.blobs.read

    @property
    def any_row(self) -> bool:
        """Whether samples may have any form, because a custom loader reads them."""
        return has_loaders()

    def names(self, base_model: str | None = None) -> list[str]:
        return self.store.names(Selection(base_model=base_model))

    def tasks(self, base_model: str | None = None) -> Iterator[Task]:
        return self.store.tasks(Selection(base_model=base_model))

    def with_adapter(self, weights: str, config: str, *, name: str, folders: Collection[str]) -> list[Task]:
        """Return the versions of tasks with an adapter of these digests, newest first.

        A store finds them by the weights of final adapters in use, by the name of the task, and by its folder.
        """
        rows = self.store.rows_of(weights=[weights], names=[name], folders=folders)
        versions = (task for row in rows for task in reversed(self.store.history(row.name)))
        return [task for task in versions if (weights, config) in {(one.weights, one.config) for one in task.adapters}]

    def version_of(self, generator: str, base_model: str) -> int | None:
        known = [one.version for one in self.store.generators(base_model) if one.blob == generator]
        return max(known, default=None)

    def generator_file(self, generator: str) -> GeneratorFile:
        return self.generator_cache.get(generator, self.read)

    def form(self, task: Task) -> OriginalForm:
        from icmlora.fleet.resources.decoding import read_form

        return read_form(self.store, task)

    def recalled(self, task: Task) -> Task | None:
        """Return the known task, with a code, that is recognized from a task's vectors."""
        from icmlora.fleet.resources.recalled_code import Exemplars

        return Exemplars(self.store, task.base_model).recognized(task)

    def predict(self, task: Task, seed: int | None) -> Adapter:
        from icmlora.fleet.resources.decoding import predict_adapter

        current = self.current(task.base_model)
        assert current is not None
        return predict_adapter(self.store, self.generator_file(current.blob), task, seed=seed)

    def base_models(self) -> Mapping[str, tuple[str, ...]]:
        """Return all names of each base model, by its main name."""
        return {base.name: base.names for base in self.store.base_models()}

    def locate(self, base_model: str) -> FoundBase:
        """Find a base model on this machine; raises `BaseModelNotFound`."""
        return locate_base(self.store, base_model)

    def context_vectors(self, base_model: str | None) -> tuple[str, ComparableVectors]:
        """Return a base model, by default the only one with vectors, and the context vectors of its tasks."""
        from icmlora.fleet.resources.stored_vectors import comparable_vectors, tasks_of_one_base

        label, tasks = tasks_of_one_base(self.store, base_model)
        return label, comparable_vectors(self.store, tasks, "context")

    def open_base(self, label: str, device: torch.device, dtype: torch.dtype, extractor: str | None) -> BaseModel:
        """Load a base model in the precision that an extractor used."""
        from icmlora.fleet.resources.loading import open_base

        return open_base(self.store, label, device, dtype, cache=self._context.cache)


class BundleCodes:
    """The codes of an open bundle; `StoreCodes` and `open_codes` explain methods and arguments."""

    name = "bundle"
    better = "run `icm train` with a higher --quality for better codes, then export them again"
    takes_claims = True

    def __init__(self, file: BundleFile, context: Context, base_model: str | Path | None, loader: str | None) -> None:
        self._file, self._context, self._base_model, self._loader = file, context, base_model, loader
        self._index, self.read = file.index, file.read
        self.any_row = loader is not None

    def find(self, name: str) -> Task | None:
        found = self._index.task(name)
        return None if found is None else self._as_imported(found)

    def get(self, name: str) -> Task:
        return self._as_imported(find_task(self._index, name))

    def names(self, base_model: str | None = None) -> list[str]:
        is_other = base_model not in (None, self._index.base_model)
        return [] if is_other else [task.name for task in self._index.tasks]

    def tasks(self, base_model: str | None = None) -> Iterator[Task]:
        return map(self.get, self.names(base_model))

    def with_adapter(self, weights: str, config: str, *, name: str, folders: Collection[str]) -> list[Task]:
        tasks = (task for task in self._index.tasks if (task.final.weights, task.final.config) == (weights, config))
        return list(map(self._as_imported, tasks))

    def _as_imported(self, task: Task) -> Task:
        check_files(task)
        return replace(task, final=replace(task.final, source=bundle_source(self._file.digest)))

    def current(self, base_model: str) -> Generator:
        """Return the one generator. It may have been trained when its base model had another name."""
        return self._index.generator

    def version_of(self, generator: str, base_model: str) -> int:
        return self._index.generator.version

    def generator_file(self, generator: str) -> GeneratorFile:
        """Open the generator after checking every byte of the bundle."""
        self._file.check()
        return self._context.generator.get(generator, self.read)

    def form(self, task: Task) -> OriginalForm:
        from icmlora.fleet.resources.decoding import form_of

        def tensors() -> BaseTensors:
            try:
                return needed_tensors(lambda: self.locate(self._index.base_model))
            except BaseModelNotFound as error:
                way = "run `icm import` with the bundle, then `icm base add NAME PATH`"
                error.hint = f"download it into the Hugging Face cache, or {way}"
                raise

        return form_of(task.final, self.read, tensors)

    def recalled(self, task: Task) -> Task | None:
        raise DataError("a bundle holds codes only", hint="import it into a store, or use source 'code'")

    def predict(self, task: Task, seed: int | None) -> Adapter:
        raise DataError("a bundle holds codes only", hint="import it into a store, or use source 'code'")

    def base_models(self) -> Mapping[str, tuple[str, ...]]:
        return {self._index.base_model: (self._index.base_model,)}

    def locate(self, base_model: str) -> FoundBase:
        aliases = {} if self._base_model is None else {base_model: self._base_model}
        try:
            return find_base_model(base_model, aliases=aliases, loader=self._loader)
        except BaseModelNotFound as error:
            error.hint = "specify its folder or GGUF file with --base-model PATH"
            raise

    def context_vectors(self, base_model: str | None) -> tuple[str, ComparableVectors]:
        from icmlora.fleet.resources.stored_vectors import comparable

        for task in self._index.tasks:
            check_vectors(task, self._file)
        known = {task.name: task.vectors for task in self._index.tasks}
        return self._index.base_model, comparable(known, self.read, "context")

    def open_base(self, label: str, device: torch.device, dtype: torch.dtype, extractor: str | None) -> BaseModel:
        from icmlora.fleet.resources.loading import load_base

        made_in = None if extractor is None else json.loads(extractor).get("dtype")
        found = replace(self.locate(label), load_in=made_in if made_in in LOAD_IN else None)
        return load_base(found, device, dtype, cache=self._context.cache)


def find_task(index: BundleIndex, name: str) -> Task:
    """Return a task of a bundle by name, in any case; raises `DataError` if there is none."""
    task = index.task(name)
    if task is None:
        close = difflib.get_close_matches(name, [task.name for task in index.tasks], n=1)
        hint = f"did you mean {close[0]!r}?" if close else "run `icm ls --from FILE` to list its tasks"
        raise DataError(f"the bundle has no task named {name!r}", hint=hint)
    return task


def check_files(task: Task) -> None:
    """Raise `UnsafeInput` if a bundle's adapter has files that its format does not allow."""
    check_companions(
        format_named(task.final.format), [extra.file for extra in task.final.extras if extra.file is not None]
    )


def check_vectors(task: Task, file: BundleFile) -> None:
    """Raise `BundleError` if the vectors of a task are not those that its manifest describes."""
    from icmlora.task_vectors.file import arrays_from_bytes

    for blob in {vector.blob for vector in task.vectors}:
        views = arrays_from_bytes(file.read(blob))
        found = {(view, number, values.shape[1]) for view, values in views.items() for number in range(len(values))}
        if found != {(one.view, one.support_set, one.dim) for one in task.vectors if one.blob == blob}:
            raise BundleError(f"the vectors of {task.name!r} do not match its manifest")
