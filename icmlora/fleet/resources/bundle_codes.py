# a protocol describes the methods of its classes
"""An open bundle as a source of codes: it answers with the tasks that a store would have after `icm import`.

The quality that a bundle states for its codes is a claim: nothing here has measured it. Never imports torch.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from icmlora.bundle.file import BundleFile
from icmlora.bundle.index import BundleIndex
from icmlora.errors import BaseModelNotFound, BundleError, DataError
from icmlora.fleet.context import OpenedGenerator, default_cache
from icmlora.formats.catalogue import format_named
from icmlora.formats.format import check_companions
from registry.manifests import Generator, Task
from registry.names import LOAD_IN, bundle_source

if TYPE_CHECKING:
    import torch

    from icmlora.adapter.model import Adapter
    from icmlora.base_models.finding.lookup import FoundBase
    from icmlora.base_models.finding.tensors import BaseTensors
    from icmlora.base_models.modality import BaseModel
    from icmlora.fleet.resources.decoding import OriginalForm
    from icmlora.fleet.resources.stored_vectors import ComparableVectors
    from icmlora.generator.codec.generator_file import GeneratorFile


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

    def find(self, name: str) -> Task | None:
        found = self._index.task(name)
        return None if found is None else self._checked(found)

    def get(self, name: str) -> Task:
        return self._checked(find_task(self._index, name))

    def names(self, base_model: str | None = None) -> list[str]:
        is_other = base_model not in (None, self._index.base_model)
        return [] if is_other else [task.name for task in self._index.tasks]

    def tasks(self, base_model: str | None = None) -> Iterator[Task]:
        return map(self.get, self.names(base_model))

    def having(self, weights: str, config: str, *, name: str, folders: Collection[str]) -> list[Task]:
        tasks = (task for task in self._index.tasks if (task.final.weights, task.final.config) == (weights, config))
        return list(map(self._checked, tasks))

    def _checked(self, task: Task) -> Task:
        files = [extra.file for extra in task.final.extras if extra.file is not None]
        check_companions(format_named(task.final.format), files)
        return replace(task, final=replace(task.final, source=bundle_source(self._file.digest)))

    def current(self, base_model: str) -> Generator:
        """Return the one generator. It may have been trained when its base model had another name."""
        return self._index.generator

    def version_of(self, generator: str, base_model: str) -> int:
        return self._index.generator.version

    def generator_file(self, generator: str) -> GeneratorFile:
        """Open the generator once every byte of the bundle was checked."""
        self.check()
        return self._generator.get(generator, self.read)

    def check(self) -> None:
        """Check every byte of the bundle; once, while the file stays as it is."""
        self._file.check()

    def form(self, task: Task) -> OriginalForm:
        from icmlora.fleet.resources.decoding import form_of

        return form_of(task.final, self.read, self._base_tensors)

    def _base_tensors(self) -> BaseTensors:
        from icmlora.base_models.finding.tensors import needed_tensors

        try:
            return needed_tensors(lambda: self.locate(self._index.base_model))
        except BaseModelNotFound as error:  # without a store there are no names for copies elsewhere
            way = "run `icm import` with the bundle, then `icm base add NAME PATH`"
            error.hint = f"download it into the Hugging Face cache, or {way}"
            raise

    def recalled(self, task: Task) -> Task | None:
        raise DataError("a bundle holds codes only", hint="import it into a store, or use source 'code'")

    def predict(self, task: Task, seed: int | None) -> Adapter:
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

        for task in self._index.tasks:
            check_vectors(task, self._file)
        known = {task.name: task.vectors for task in self._index.tasks}
        return self._index.base_model, comparable(known, self.read, "context")

    def open_base(self, label: str, device: torch.device, dtype: torch.dtype, extractor: str | None) -> BaseModel:
        """Load the base model in as few bits as the vectors were made with, so that vectors can be compared."""
        from icmlora.fleet.resources.loading import load_base

        made_in = None if extractor is None else json.loads(extractor).get("dtype")
        found = replace(self.locate(label), load_in=made_in if made_in in LOAD_IN else None)
        return load_base(found, device, dtype, cache=self._cache or default_cache())


def find_task(index: BundleIndex, name: str) -> Task:
    """Return a task of a bundle by name, in any case; raises `DataError` if there is none."""
    task = index.task(name)
    if task is None:
        close = difflib.get_close_matches(name, [task.name for task in index.tasks], n=1)
        hint = f"did you mean {close[0]!r}?" if close else "run `icm ls --from FILE` to list its tasks"
        raise DataError(f"the bundle has no task named {name!r}", hint=hint)
    return task


def check_vectors(task: Task, file: BundleFile) -> None:
    """Raise `BundleError` if the vectors of a task are not those that its manifest describes."""
    from icmlora.task_vectors.file import arrays_from_bytes

    for blob in {vector.blob for vector in task.vectors}:
        views = arrays_from_bytes(file.read(blob))
        found = {(view, number, values.shape[1]) for view, values in views.items() for number in range(len(values))}
        if found != {(one.view, one.support_set, one.dim) for one in task.vectors if one.blob == blob}:
            raise BundleError(f"the vectors of {task.name!r} do not match its manifest")
