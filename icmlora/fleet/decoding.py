"""Make the adapter of a task: from its code, with or without the residual, or from its task vectors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from icmlora.adapter.layout import ModuleShape
from icmlora.adapter.model import Adapter
from icmlora.errors import CodeError, DataError
from icmlora.formats.catalogue import format_named
from icmlora.generator.codec import Codec
from icmlora.generator.versions import GeneratorFile
from registry.errors import DamagedStore

if TYPE_CHECKING:
    from registry.records import AdapterRecord, CodeRecord
    from registry.store import Store


def decode_code(
    store: Store, generator_file: GeneratorFile, code: CodeRecord, source: Literal["residual", "code"]
) -> Adapter:
    """Read a code from disk and decode it."""
    data = store.blobs.read(code.blob)
    codec = generator_file.codec_of(data)
    if source == "code" or code.residual is None:
        return codec.decode(data)
    from icmlora.generator.residual_codec import ResidualCodec  # most codes have no residual

    return ResidualCodec(codec).decode(data, store.blobs.read(code.residual.blob))


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


def generate_adapter(
    store: Store,
    generator_file: GeneratorFile,
    final: AdapterRecord,
    code: CodeRecord | None,
    *,
    seed: int | None = None,
) -> Adapter:
    """Generate the adapter of a task from its task vectors, without its code."""
    from icmlora.fleet.adapter_source import mean_vectors  # imports what training needs

    vectors = mean_vectors(store, store.vectors.all(final.task))
    if not vectors:
        raise DataError(f"task {final.task!r} has no task vectors", hint="run `icm vectors` to extract them")
    layout = [ModuleShape(*entry) for entry in final.layout]
    codec = codec_of_task(store, generator_file, code, layout)
    config = format_named(final.format).read_config(store.blobs.read(final.config))
    return codec.generate(vectors, layout, task_type=config.task_type, seed=seed)
