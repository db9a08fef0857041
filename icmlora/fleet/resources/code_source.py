# ruff: noqa: D102  # a protocol describes the methods of its classes
"""Where codes are: an open store, or an open bundle. Whatever needs codes is written once, for both.

A bundle answers with the rows that a store would have after `icm import`. Never imports torch by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Literal, Protocol

from icmlora.adapter.layout import ModuleShape
from icmlora.fleet.context import Context, has_loaders, locate_base
from icmlora.formats.format import Template
from registry.errors import DamagedStore
from registry.records import AdapterRecord, CodeRecord, EvaluationRecord, GeneratorRecord, TaskRecord, latest_evaluation

if TYPE_CHECKING:
    import torch

    from icmlora.adapter.model import Adapter
    from icmlora.base_models.finding.lookup import FoundBase
    from icmlora.base_models.modality import BaseModel
    from icmlora.fleet.resources.decoding import OriginalForm
    from icmlora.fleet.resources.stored_vectors import ComparableVectors
    from icmlora.generator.versions import GeneratorFile
    from registry.filters import Selection
    from registry.store import Store

Decoded = Literal["code", "recalled", "network"]


class CodeSource(Protocol):
    """An open store or bundle: its rows, the bytes that they name, and what is made of both."""

    name: str  # "store" or "bundle"
    better: str  # how to get better codes, as a hint
    takes_claims: bool  # whether limits are held against what a bundle claims of its codes

    @property
    def any_row(self) -> bool:
        """Whether samples may have any form, because a loader of the user's reads them."""

    def find(self, name: str) -> TaskRecord | None:
        """Return the task of a name, in any case, or None."""

    def get(self, name: str) -> TaskRecord:
        """Return the task of a name, in any case; raises if there is none."""

    def names(self, base_model: str | None = None) -> list[str]:
        """Return the names of all tasks, or of those of one base model, sorted."""

    def final(self, task: str) -> AdapterRecord:
        """Return the final adapter of a task."""

    def finals(self, base_model: str) -> Iterator[AdapterRecord]:
        """Yield the final adapters of the tasks of a base model."""

    def having(self, weights: str, config: str) -> list[AdapterRecord]:
        """Return the adapters with these digests; several tasks may have one."""

    def generator(self, base_model: str) -> GeneratorRecord | None:
        """Return the current generator of a base model."""

    def code(self, task: str, generator: GeneratorRecord) -> CodeRecord | None:
        """Return the code of a task under a generator."""

    def measured(self, task: TaskRecord, source: Decoded, generator: GeneratorRecord) -> EvaluationRecord | None:
        """Return how a source of a task does; None if nobody measured it here."""

    def read(self, digest: str) -> bytes:
        """Return bytes that a row names, checked."""

    def generator_file(self, generator: GeneratorRecord) -> GeneratorFile:
        """Open a generator to decode with; raises if anything is damaged that belongs to it."""

    def form(self, adapter: AdapterRecord) -> OriginalForm:
        """Read the form and the extras of an original; its weights need not be there."""

    def recalled(self, final: AdapterRecord, generator: GeneratorRecord) -> CodeRecord | None:
        """Return the code of the known task recognized from a task's vectors; None if none is."""

    def predict(self, final: AdapterRecord, generator: GeneratorRecord, seed: int | None) -> Adapter:
        """Predict the adapter of a task from its vectors, with the network alone."""

    def base_models(self) -> Mapping[str, tuple[str, ...]]:
        """Return all names of each base model, by its main name."""

    def locate(self, base_model: str) -> FoundBase:
        """Find a base model on this machine; raises `BaseModelNotFound`."""

    def context_vectors(self, base_model: str | None) -> tuple[str, ComparableVectors]:
        """Return a base model, by default the only one with vectors, and the context vectors of its tasks."""

    def open_base(self, label: str, device: torch.device, dtype: torch.dtype, extractor: str | None) -> BaseModel:
        """Load a base model as the vectors of an extractor were made with it."""


def template_of(adapter: AdapterRecord, config: bytes) -> Template:
    """Return the form of an original as its row has it, with its configuration."""
    return Template(config, tuple(ModuleShape(*entry) for entry in adapter.layout), adapter.dtype, adapter.template)


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
        self.store, self._context = store, context
        tasks = store.tasks
        self.find, self.get, self.final, self.having = tasks.find, tasks.get, tasks.final, tasks.having
        self.read, self.generator = store.blobs.read, store.generators.current

    @property
    def any_row(self) -> bool:
        return has_loaders(self.store)

    def names(self, base_model: str | None = None) -> list[str]:
        return self.store.tasks.names(_selection(base_model))

    def finals(self, base_model: str) -> Iterator[AdapterRecord]:
        return (row.final for row in self.store.tasks.summaries(_selection(base_model)))

    def code(self, task: str, generator: GeneratorRecord) -> CodeRecord | None:
        return self.store.codes.get(task, generator.id)

    def measured(self, task: TaskRecord, source: Decoded, generator: GeneratorRecord) -> EvaluationRecord | None:
        rung = "generate" if source == "recalled" else source  # as the rows have it
        try:
            return latest_evaluation(self.store.evaluations.all(task.name), task, rung, generator)
        except DamagedStore:  # `icm verify` reports it: it takes no figures to write an adapter
            return None

    def generator_file(self, generator: GeneratorRecord) -> GeneratorFile:
        return self._context.generator.get(generator.blob, self.read)

    def form(self, adapter: AdapterRecord) -> OriginalForm:
        from icmlora.fleet.resources.decoding import read_form

        return read_form(self.store, adapter)

    def recalled(self, final: AdapterRecord, generator: GeneratorRecord) -> CodeRecord | None:
        from icmlora.fleet.resources.recalled_code import Exemplars

        return Exemplars(self.store, generator).code_for(final)

    def predict(self, final: AdapterRecord, generator: GeneratorRecord, seed: int | None) -> Adapter:
        from icmlora.fleet.resources.decoding import predict_adapter

        code = self.code(final.task, generator)
        return predict_adapter(self.store, self.generator_file(generator), final, code, seed=seed)

    def base_models(self) -> Mapping[str, tuple[str, ...]]:
        return {record.name: record.names for record in self.store.base_models.all()}

    def locate(self, base_model: str) -> FoundBase:
        return locate_base(self.store, base_model)

    def context_vectors(self, base_model: str | None) -> tuple[str, ComparableVectors]:
        from icmlora.fleet.resources.stored_vectors import comparable_vectors, tasks_of_one_base

        label, tasks = tasks_of_one_base(self.store, base_model)
        return label, comparable_vectors(self.store, tasks, "context")

    def open_base(self, label: str, device: torch.device, dtype: torch.dtype, extractor: str | None) -> BaseModel:
        from icmlora.fleet.resources.loading import open_base

        return open_base(self.store, label, device, dtype, cache=self._context.cache)


def _selection(base_model: str | None) -> Selection:
    from registry.filters import Selection  # not needed to read one task

    return Selection(base_model=base_model)
