# a protocol describes the methods of its classes
"""Sources of codes: an open store, or an open bundle. Readers of codes are written once, for both.

Never imports torch by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Literal, Protocol

from icmlora.fleet.context import Context, has_loaders, locate_base
from registry.filters import Selection
from registry.manifests import Generator, Task

if TYPE_CHECKING:
    import torch

    from icmlora.adapter.model import Adapter
    from icmlora.base_models.finding.lookup import FoundBase
    from icmlora.base_models.modality import BaseModel
    from icmlora.fleet.resources.decoding import OriginalForm
    from icmlora.fleet.resources.stored_vectors import ComparableVectors
    from icmlora.generator.codec.generator_file import GeneratorFile
    from registry.store import Store

Decoded = Literal["code", "recalled", "network"]


class AdapterParts(Protocol):
    """What the adapter of a task is made from: bytes that its manifest names, and the generator of its code."""

    better: str  # how to get better codes, as a hint
    takes_claims: bool  # whether limits are held against the quality that a bundle states for its codes

    def version_of(self, generator: str, base_model: str) -> int | None:
        """Return the version of the generator with a network; None if it is not known."""

    def read(self, digest: str) -> bytes:
        """Return bytes that a manifest names, verified."""

    def generator_file(self, generator: str) -> GeneratorFile:
        """Open the generator with a digest, to decode with it; raise if a part of it is damaged."""

    def form(self, task: Task) -> OriginalForm:
        """Read the form and the extras of an original; its weights need not be there."""

    def predict(self, task: Task, seed: int | None) -> Adapter:
        """Predict the adapter of a task from its vectors, with the network alone."""


class CodeSource(AdapterParts, Protocol):
    """An open store or bundle: its tasks, the bytes that they name, and the adapters made of both."""

    name: str  # "store" or "bundle"

    @property
    def any_row(self) -> bool:
        """Whether samples may have any form, because a loader of the user's reads them."""

    def find(self, name: str) -> Task | None:
        """Return the task of a name, in any case, or None."""

    def get(self, name: str) -> Task:
        """Return the task of a name, in any case; raise if there is none."""

    def names(self, base_model: str | None = None) -> list[str]:
        """Return the sorted names of all tasks, or of the tasks of one base model."""

    def tasks(self, base_model: str | None = None) -> Iterator[Task]:
        """Yield all tasks, or the tasks of one base model."""

    def having(self, weights: str, config: str, *, name: str, folders: Collection[str]) -> list[Task]:
        """Return the versions of tasks with an adapter of these digests, newer ones first.

        A store finds them by the weights of final adapters in use, by the name of the task, and by its folder.
        """

    def current(self, base_model: str) -> Generator | None:
        """Return the generator in use for a base model."""

    def recalled(self, task: Task) -> Task | None:
        """Return the known task, with a code, that is recognized from a task's vectors."""

    def base_models(self) -> Mapping[str, tuple[str, ...]]:
        """Return all names of each base model, by its main name."""

    def locate(self, base_model: str) -> FoundBase:
        """Find a base model on this machine; raises `BaseModelNotFound`."""

    def context_vectors(self, base_model: str | None) -> tuple[str, ComparableVectors]:
        """Return a base model, by default the only one with vectors, and the context vectors of its tasks."""

    def open_base(self, label: str, device: torch.device, dtype: torch.dtype, extractor: str | None) -> BaseModel:
        """Load a base model as the vectors of an extractor were made with it."""


OpenCodes = Callable[[], AbstractContextManager[CodeSource]]
"""Opens a store or a bundle for one piece of work."""


@contextmanager
def open_store(context: Context, *, read_only: bool = True) -> Iterator[StoreCodes]:
    """Open the store of a context as a source of codes."""
    with context.open(read_only=read_only) as store:
        yield StoreCodes(store, context)


class StoreCodes:
    """The codes of an open store; `CodeSource` describes the methods."""

    name = "store"
    better = (
        "use `--source original` for the exact adapter, or run `icm train` with a higher --quality for better codes"
    )
    takes_claims = False

    def __init__(self, store: Store, context: Context) -> None:
        self.store, self._context, self.opened_generator = store, context, context.generator
        self.find, self.get, self.current, self.read = store.find, store.task, store.generator, store.blobs.read

    @property
    def any_row(self) -> bool:
        return has_loaders()

    def names(self, base_model: str | None = None) -> list[str]:
        return self.store.names(Selection(base_model=base_model))

    def tasks(self, base_model: str | None = None) -> Iterator[Task]:
        return self.store.tasks(Selection(base_model=base_model))

    def having(self, weights: str, config: str, *, name: str, folders: Collection[str]) -> list[Task]:
        rows = self.store.rows_of(weights=[weights], names=[name], folders=folders)
        versions = (task for row in rows for task in reversed(self.store.history(row.name)))
        return [task for task in versions if (weights, config) in {(one.weights, one.config) for one in task.adapters}]

    def version_of(self, generator: str, base_model: str) -> int | None:
        known = [one.version for one in self.store.generators(base_model) if one.blob == generator]
        return max(known, default=None)

    def generator_file(self, generator: str) -> GeneratorFile:
        return self.opened_generator.get(generator, self.read)

    def form(self, task: Task) -> OriginalForm:
        from icmlora.fleet.resources.decoding import read_form

        return read_form(self.store, task)

    def recalled(self, task: Task) -> Task | None:
        from icmlora.fleet.resources.recalled_code import Exemplars

        return Exemplars(self.store, task.base_model).recognized(task)

    def predict(self, task: Task, seed: int | None) -> Adapter:
        from icmlora.fleet.resources.decoding import predict_adapter

        current = self.current(task.base_model)
        assert current is not None
        return predict_adapter(self.store, self.generator_file(current.blob), task, seed=seed)

    def base_models(self) -> Mapping[str, tuple[str, ...]]:
        return {base.name: base.names for base in self.store.base_models()}

    def locate(self, base_model: str) -> FoundBase:
        return locate_base(self.store, base_model)

    def context_vectors(self, base_model: str | None) -> tuple[str, ComparableVectors]:
        from icmlora.fleet.resources.stored_vectors import comparable_vectors, tasks_of_one_base

        label, tasks = tasks_of_one_base(self.store, base_model)
        return label, comparable_vectors(self.store, tasks, "context")

    def open_base(self, label: str, device: torch.device, dtype: torch.dtype, extractor: str | None) -> BaseModel:
        from icmlora.fleet.resources.loading import open_base

        return open_base(self.store, label, device, dtype, cache=self._context.cache)
