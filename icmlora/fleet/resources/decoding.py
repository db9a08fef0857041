"""Make the adapter of a task: from its code, or as the network predicts it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from icmlora.adapter.layout import ModuleShape
from icmlora.adapter.model import Adapter
from icmlora.base_models.finding.tensors import BaseTensors, needed_tensors
from icmlora.errors import CodeError, DataError
from icmlora.fleet.context import locate_base
from icmlora.fleet.resources.adapter_row import read_companions, template_of
from icmlora.formats.base_references import MAX_RECORD, REFERENCES
from icmlora.formats.catalogue import format_named
from icmlora.formats.extras import unpack_extras, unpack_tensors
from icmlora.formats.format import AdapterBytes, AdapterFormat, RunnableAdapter, Template
from icmlora.formats.peft.peft import CONTEXT_NAMES
from icmlora.generator.codec.generator_file import GeneratorFile
from registry.errors import DamagedStore

if TYPE_CHECKING:
    from icmlora.base_models.examples.context import TaskContext
    from icmlora.generator.codec.codec import Codec
    from icmlora.io.safetensors import RawTensor
    from registry.manifests import Code, StoredAdapter, Task
    from registry.store import Store


def decode_code(store: Store, generator_file: GeneratorFile, code: Code) -> Adapter:
    """Read a code and decode it; raise `DamagedStore` or `CodeError` if it cannot be decoded."""
    return code_reader(store.blobs.read, generator_file, code)()


def code_reader(read: Callable[[str], bytes], generator_file: GeneratorFile, code: Code) -> Callable[[], Adapter]:
    """Read a code, and return a function that decodes it on any thread."""
    data = read(code.blob)
    return partial(generator_file.codec_of(data).decode, data)


@dataclass(frozen=True)
class OriginalForm:
    """The format and form of an original, with everything that its code cannot represent."""

    format: AdapterFormat
    template: Template
    tensors: Mapping[str, RawTensor]
    files: Mapping[str, bytes]

    def write(
        self,
        adapter: Adapter,
        *,
        card: str | None = None,
        metadata: Mapping[str, str] | None = None,
        dtype: str | None = None,
        pad_rank: int | None = None,
    ) -> AdapterBytes:
        """Return the files of a decoded adapter in this form; without a card by default."""
        written = self.format.encode(
            adapter,
            card=card or "",
            metadata=metadata or {},
            like=self.template,
            dtype=dtype,
            pad_rank=pad_rank,
            extras=self.tensors,
        )
        return replace(written, card=None if card is None else written.card, companions=self.files)

    def runnable(self, adapter: Adapter, dtype: str | None = None) -> RunnableAdapter:
        """Return a decoded adapter as it would be read from its written files."""
        files = self.write(adapter, dtype=dtype)
        return self.format.runnable(files.config, files.weights)


def read_form(store: Store, task: Task) -> OriginalForm:
    """Read the form and the extras of a task's original, whose weights may be missing."""
    return form_of(task.final, store.blobs.read, partial(base_tensors, store, task))


def form_of(final: StoredAdapter, read: Callable[[str], bytes], base: Callable[[], BaseTensors]) -> OriginalForm:
    """Read the form and the extras of an original; `base` opens its base model if extras refer to its tensors."""
    tensors: Mapping[str, RawTensor] = {}
    files: Mapping[str, bytes] = {}
    if final.extras:
        tensors, files = unpack_extras(((extra.file, extra.blob) for extra in final.extras), read, base)
    return OriginalForm(format_named(final.format), template_of(final, read(final.config)), tensors, files)


def files_of_code(store: Store, generator_file: GeneratorFile, task: Task) -> AdapterBytes:
    """Return the files that the code of a task decodes to, without a card."""
    assert task.code is not None
    return read_form(store, task).write(decode_code(store, generator_file, task.code))


def read_context(read: Callable[[str], bytes], final: StoredAdapter) -> TaskContext | None:
    """Read the context for the prompts of a task; None if it has none. Raises `DataError` if it is damaged."""
    from icmlora.base_models.examples.context import TaskContext  # parsers, which most adapters do not need

    return TaskContext.read(read_companions(read, final, CONTEXT_NAMES))


def check_references(store: Store, task: Task) -> None:
    """Check that the base model still has the tensors that the extras of a task refer to.

    Raises:
        BaseModelNotFound: The base model is needed, and it is not on this machine.
        BaseModelMismatch: It does not have these tensors.
    """
    small = [extra.blob for extra in task.final.extras if extra.file is None and extra.packed_size <= MAX_RECORD]
    references = [blob for blob in map(store.blobs.read, small) if blob.startswith(REFERENCES)]
    unpack_tensors(references, partial(base_tensors, store, task))


def base_tensors(store: Store, task: Task) -> BaseTensors:
    """Open the tensors of a task's base model."""
    return needed_tensors(lambda: locate_base(store, task.base_model))


def codec_of_task(
    store: Store, generator_file: GeneratorFile, code: Code | None, layout: Sequence[ModuleShape]
) -> Codec:
    """Return the codec of the network that made a code, or of the newest network if the code cannot be read."""
    if code is not None:
        try:
            return generator_file.codec_of(store.blobs.read(code.blob))
        except (CodeError, DamagedStore):
            pass
    return generator_file.codec_for(layout)


def predict_adapter(store: Store, generator_file: GeneratorFile, task: Task, *, seed: int | None = None) -> Adapter:
    """Predict the adapter of a task from its vectors with the network alone; raise `DataError` if it has none."""
    from icmlora.fleet.resources.adapter_source import mean_vectors  # imports everything that training needs

    vectors = mean_vectors(store, task.vectors)
    if not vectors:
        raise DataError(f"task {task.name!r} has no task vectors", hint="run `icm vectors` to extract them")
    layout = [ModuleShape(*entry) for entry in task.final.layout]
    codec = codec_of_task(store, generator_file, task.code, layout)
    config = format_named(task.final.format).read_config(store.blobs.read(task.final.config))
    return codec.generate(vectors, layout, task_type=config.task_type, seed=seed)
