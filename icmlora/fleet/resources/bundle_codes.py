# ruff: noqa: D102  # a protocol describes the methods of its classes
"""An open bundle as a source of codes: it answers with the rows that a store would have after `icm import`.

What a bundle says of its codes is a claim of whoever made it: nothing here has measured it. Never imports torch.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from registry.records import (
    AdapterRecord,
    Claim,
    CodeRecord,
    Extra,
    GeneratorRecord,
    NewAdapter,
    NewVector,
    TaskRecord,
    VectorRecord,
)

from icmlora.adapter.module_groups import blocks_of
from icmlora.bundle.file import BundleFile
from icmlora.bundle.index import BundledTask, BundleIndex
from icmlora.errors import BaseModelNotFound, BundleError, DataError
from icmlora.fleet.context import OpenedGenerator, default_cache
from icmlora.formats.catalogue import format_named
from icmlora.formats.format import check_companions
from registry.names import LOAD_IN, bundle_source

if TYPE_CHECKING:
    import torch

    from icmlora.adapter.model import Adapter
    from icmlora.base_models.finding.lookup import FoundBase
    from icmlora.base_models.finding.tensors import BaseTensors
    from icmlora.base_models.modality import BaseModel
    from icmlora.fleet.resources.code_source import Decoded
    from icmlora.fleet.resources.decoding import OriginalForm
    from icmlora.fleet.resources.stored_vectors import ComparableVectors
    from icmlora.generator.versions import GeneratorFile


class BundleCodes:
    """The codes of an open bundle; `CodeSource` describes the methods.

    Args:
        file: The bundle.
        generator: Keeps its generator open from one piece of work to the next.
        base_model: Where its base model is; by default it is looked for in the Hugging Face cache.
        loader: `MODULE:FUNCTION` of what loads the base model, where transformers does not.
        cache: Folder for a base model converted from GGUF.
    """

    name = "bundle"
    better = "run `icm train` with a higher --quality for better codes, then export them again"
    takes_claims = True

    def __init__(
        self,
        file: BundleFile,
        generator: OpenedGenerator,
        base_model: str | Path | None = None,
        loader: str | None = None,
        cache: Path | None = None,
    ) -> None:
        self._file, self._generator = file, generator
        self._base_model, self._loader, self._cache = base_model, loader, cache
        self._index, self.read = file.index, file.read

    @property
    def any_row(self) -> bool:
        return self._loader is not None

    def find(self, name: str) -> TaskRecord | None:
        found = self._index.task(name)
        return None if found is None else TaskRecord(0, found.name, self._index.base_model, None, None, "", False)

    def get(self, name: str) -> TaskRecord:
        return TaskRecord(0, find_task(self._index, name).name, self._index.base_model, None, None, "", False)

    def names(self, base_model: str | None = None) -> list[str]:
        is_other = base_model not in (None, self._index.base_model)
        return [] if is_other else [task.name for task in self._index.tasks]

    def final(self, task: str) -> AdapterRecord:
        return self._adapter(find_task(self._index, task))

    def finals(self, base_model: str) -> Iterator[AdapterRecord]:
        return map(self.final, self.names(base_model))

    def having(self, weights: str, config: str) -> list[AdapterRecord]:
        tasks = self._index.tasks
        return [self._adapter(task) for task in tasks if (task.weights, task.config) == (weights, config)]

    def _adapter(self, task: BundledTask) -> AdapterRecord:
        check_companions(format_named(task.format), task.files)
        new, size = bundled_adapter(task, self._file), task.weights_size
        none = {"initial_bytes": 0, "created_at": "", "evicted_at": ""}
        return AdapterRecord(**vars(new), **none, id=0, task=task.name, original_bytes=size, weights_bytes=size)  # type: ignore[arg-type]

    def generator(self, base_model: str) -> GeneratorRecord:
        """Return the one generator. It may have been trained when its base model had another name."""
        found = self._index.generator
        size = self._index.sizes[found.blob]
        facts = found.version, None, found.blob, size, found.config, found.metrics
        return GeneratorRecord(0, self._index.base_model, *facts, True, "", None, 0)

    def code(self, task: str, generator: GeneratorRecord) -> CodeRecord:
        found = find_task(self._index, task)
        size = self._index.sizes[found.code]
        return CodeRecord(0, found.name, 0, 0, found.code, size, 0.0, None, None, None, claim_of(found))

    def measured(self, task: TaskRecord, source: Decoded, generator: GeneratorRecord) -> None:
        """Return None: nothing was measured here."""

    def generator_file(self, generator: GeneratorRecord) -> GeneratorFile:
        """Open the generator once every byte of the bundle was checked."""
        self.check()
        return self._generator.get(generator.blob, self.read)

    def check(self) -> None:
        """Check every byte of the bundle; once, while the file stays as it is."""
        self._file.check()

    def form(self, adapter: AdapterRecord) -> OriginalForm:
        from icmlora.fleet.resources.decoding import form_of

        return form_of(adapter, self.read, self._base_tensors)

    def _base_tensors(self) -> BaseTensors:
        from icmlora.base_models.finding.tensors import needed_tensors

        try:
            return needed_tensors(lambda: self.locate(self._index.base_model))
        except BaseModelNotFound as error:  # without a store there are no names for copies elsewhere
            way = "run `icm import` with the bundle, then `icm base add NAME PATH`"
            error.hint = f"download it into the Hugging Face cache, or {way}"
            raise

    def recalled(self, final: AdapterRecord, generator: GeneratorRecord) -> CodeRecord | None:
        """Refuse: what a bundle has of a task is its code."""
        raise DataError("a bundle holds codes only", hint="import it into a store, or use source 'code'")

    def predict(self, final: AdapterRecord, generator: GeneratorRecord, seed: int | None) -> Adapter:
        raise DataError("a bundle holds codes only", hint="import it into a store, or use source 'code'")

    def base_models(self) -> Mapping[str, tuple[str, ...]]:
        return {self._index.base_model: (self._index.base_model,)}

    def locate(self, base_model: str) -> FoundBase:
        from icmlora.base_models.finding.lookup import find_base_model

        aliases = {} if self._base_model is None else {base_model: self._base_model}
        try:
            return find_base_model(base_model, aliases=aliases, loader=self._loader)
        except BaseModelNotFound as error:  # without a store there are no names for copies elsewhere
            error.hint = "specify its folder or GGUF file with --base-model PATH"
            raise

    def context_vectors(self, base_model: str | None) -> tuple[str, ComparableVectors]:
        from icmlora.fleet.resources.stored_vectors import comparable

        rows = {task.name: bundled_vectors(task, self._file) for task in self._index.tasks}
        known = {name: [VectorRecord(**vars(new), id=0) for new in found] for name, found in rows.items()}
        return self._index.base_model, comparable(known, self.read, "context")

    def open_base(self, label: str, device: torch.device, dtype: torch.dtype, extractor: str | None) -> BaseModel:
        """Load the base model in as few bits as the vectors were made with: what is compared has to be alike."""
        from icmlora.fleet.resources.loading import load_base

        made_in = None if extractor is None else json.loads(extractor).get("dtype")
        found = replace(self.locate(label), load_in=made_in if made_in in LOAD_IN else None)
        return load_base(found, device, dtype, cache=self._cache or default_cache())


def find_task(index: BundleIndex, name: str) -> BundledTask:
    """Return a task of a bundle by name, in any case; raises `DataError` if there is none."""
    task = index.task(name)
    if task is None:
        close = difflib.get_close_matches(name, [task.name for task in index.tasks], n=1)
        hint = f"did you mean {close[0]!r}?" if close else "run `icm ls --from FILE` to list its tasks"
        raise DataError(f"the bundle has no task named {name!r}", hint=hint)
    return task


def claim_of(task: BundledTask) -> Claim | None:
    """Return what a bundle says of a code: whoever made it may have measured it, or not."""
    if task.squared_error is None and task.measured is None:
        return None
    return Claim(task.squared_error, None if task.measured is None else asdict(task.measured))


def bundled_adapter(task: BundledTask, file: BundleFile) -> NewAdapter:
    """Return the row of an adapter that a bundle has the code of."""
    is_for_images = format_named(task.format).is_for_images
    return NewAdapter(
        weights=task.weights,
        config=task.config,
        card=task.card,
        step=task.step,
        is_final=True,
        dtype=task.dtype,
        rank_max=task.rank_max,
        parameters=task.parameters,
        # As ingesting its original would name them.
        target_modules=blocks_of(shape.module for shape in task.layout) if is_for_images else task.target_modules,
        layout=[(shape.module, shape.rank, shape.inputs, shape.outputs) for shape in task.layout],
        source=bundle_source(file.digest),
        is_generated=task.is_generated,
        template=task.template,
        format=task.format,
        extras=[Extra(extra.part, extra.file, extra.size, file.index.sizes[extra.part]) for extra in task.extras],
    )


def bundled_vectors(task: BundledTask, file: BundleFile) -> list[NewVector]:
    """Return the rows of a task's vectors; raises `BundleError` if they are not those of the index."""
    from icmlora.task_vectors.file import arrays_from_bytes

    if task.vectors is None:
        return []
    part, extractors = task.vectors.part, {one["view"]: one for one in task.vectors.extractors}
    views = arrays_from_bytes(file.read(part))
    if views.keys() != extractors.keys():
        raise BundleError(f"the vectors of {task.name!r} do not match the index")
    return [
        NewVector(task.name, view, number, extractors[view], part, values.shape[1])
        for view, values in views.items()
        for number in range(len(values))
    ]
