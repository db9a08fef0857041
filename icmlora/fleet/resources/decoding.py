"""Make the adapter of a task: from its code, or as the network predicts it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from icmlora.adapter.layout import ModuleShape
from icmlora.adapter.model import Adapter
from icmlora.errors import CodeError, DataError
from icmlora.fleet.resources.code_source import template_of
from icmlora.formats.catalogue import format_named
from icmlora.formats.format import AdapterBytes, AdapterFormat, RunnableAdapter, Template
from icmlora.formats.peft.peft import CONTEXT_NAMES
from icmlora.generator.versions import GeneratorFile
from registry.errors import DamagedStore

if TYPE_CHECKING:
    from icmlora.base_models.examples.context import TaskContext
    from icmlora.base_models.finding.tensors import BaseTensors
    from icmlora.generator.codec import Codec
    from icmlora.io.safetensors import RawTensor
    from registry.records import AdapterRecord, CodeRecord
    from registry.store import Store


def decode_code(store: Store, generator_file: GeneratorFile, code: CodeRecord) -> Adapter:
    """Read a code from disk and decode it; raises `DamagedStore`, or `CodeError` for one that is no code."""
    return code_reader(store.blobs.read, generator_file, code)()


def code_reader(read: Callable[[str], bytes], generator_file: GeneratorFile, code: CodeRecord) -> Callable[[], Adapter]:
    """Read a code, and return what decodes it, on any thread."""
    data = read(code.blob)
    return partial(generator_file.codec_of(data).decode, data)


@dataclass(frozen=True)
class OriginalForm:
    """What a decoded adapter takes over from its original: format, form, and what a code cannot represent."""

    format: AdapterFormat
    template: Template
    tensors: Mapping[str, RawTensor]
    files: Mapping[str, bytes]

    def runnable(self, adapter: Adapter, dtype: str | None = None) -> RunnableAdapter:
        """Write a decoded adapter in this form, as `icm materialize` does, and read it again."""
        files = self.format.encode(adapter, card="", metadata={}, like=self.template, dtype=dtype, extras=self.tensors)
        return self.format.runnable(files.config, files.weights)


def read_form(store: Store, final: AdapterRecord) -> OriginalForm:
    """Read the form and the extras of a task's original; its weights need not be there."""
    return form_of(final, store.blobs.read, partial(base_tensors, store, final))


def form_of(final: AdapterRecord, read: Callable[[str], bytes], base: Callable[[], BaseTensors]) -> OriginalForm:
    """Read the form and the extras of an original; `base` opens its base model, to whose tensors extras may refer."""
    tensors: Mapping[str, RawTensor] = {}
    files: Mapping[str, bytes] = {}
    if final.extras:
        from icmlora.formats.extras import unpack_extras

        tensors, files = unpack_extras(((extra.file, extra.blob) for extra in final.extras), read, base)
    return OriginalForm(format_named(final.format), template_of(final, read(final.config)), tensors, files)


def files_like_original(adapter: Adapter, form: OriginalForm) -> AdapterBytes:
    """Return the files of a decoded adapter in the form of its original, without a card."""
    files = form.format.encode(adapter, card="", metadata={}, like=form.template, extras=form.tensors)
    return replace(files, card=None, companions=form.files)


def files_of_code(store: Store, generator_file: GeneratorFile, final: AdapterRecord, code: CodeRecord) -> AdapterBytes:
    """Return the files of a task as its code brings them back."""
    return files_like_original(decode_code(store, generator_file, code), read_form(store, final))


def read_companions(
    read: Callable[[str], bytes], final: AdapterRecord, names: Collection[str] | None = None
) -> dict[str, bytes]:
    """Read the files that came with an adapter: those of some names, or all."""
    from icmlora.formats.extras import unpack

    files = ((extra.file, extra.blob) for extra in final.extras)
    return {name: unpack(read(blob)) for name, blob in files if name is not None and (names is None or name in names)}


def read_context(read: Callable[[str], bytes], final: AdapterRecord) -> TaskContext | None:
    """Read the context that stands before a task's requests; None if it has none.

    Raises:
        DataError: The files cannot be read as one.
    """
    from icmlora.base_models.examples.context import TaskContext  # parsers, which a folder does not need

    return TaskContext.read(read_companions(read, final, CONTEXT_NAMES))


def check_references(store: Store, final: AdapterRecord) -> None:
    """Check that the base model still has the tensors that an adapter's extras refer to.

    Raises:
        BaseModelNotFound: The base model is needed, and it is not on this machine.
        BaseModelMismatch: It does not have these tensors.
    """
    from icmlora.formats.base_references import MAX_RECORD, REFERENCES
    from icmlora.formats.extras import unpack_tensors

    small = [extra.blob for extra in final.extras if extra.file is None and extra.packed_size <= MAX_RECORD]
    references = [blob for blob in map(store.blobs.read, small) if blob.startswith(REFERENCES)]
    unpack_tensors(references, partial(base_tensors, store, final))


def base_tensors(store: Store, final: AdapterRecord) -> BaseTensors:
    """Open the tensors of a task's base model, to which its extras may refer."""
    from icmlora.base_models.finding.tensors import needed_tensors
    from icmlora.fleet.context import locate_base

    return needed_tensors(lambda: locate_base(store, store.tasks.get(final.task).base_model))


def codec_of_task(
    store: Store, generator_file: GeneratorFile, code: CodeRecord | None, layout: Sequence[ModuleShape]
) -> Codec:
    """Return the codec of the version that a task's code was made with."""
    if code is not None:
        try:
            return generator_file.codec_of(store.blobs.read(code.blob))
        # Without a readable code, take the newest version that covers the adapter.
        except (CodeError, DamagedStore):
            pass
    return generator_file.codec_for(layout)


def predict_adapter(
    store: Store,
    generator_file: GeneratorFile,
    final: AdapterRecord,
    code: CodeRecord | None,
    *,
    seed: int | None = None,
) -> Adapter:
    """Predict the adapter of a task from its vectors with the network alone; raises `DataError` if it has none."""
    from icmlora.fleet.resources.adapter_source import mean_vectors  # imports what training needs

    vectors = mean_vectors(store, store.vectors.all(final.task))
    if not vectors:
        raise DataError(f"task {final.task!r} has no task vectors", hint="run `icm vectors` to extract them")
    layout = [ModuleShape(*entry) for entry in final.layout]
    codec = codec_of_task(store, generator_file, code, layout)
    config = format_named(final.format).read_config(store.blobs.read(final.config))
    return codec.generate(vectors, layout, task_type=config.task_type, seed=seed)
