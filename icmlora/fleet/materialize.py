"""A code of the store: the version that it names, and the adapter it is, with or without what lies beside it.

Write one task's adapter as a PEFT folder: from its original, its code (and residual), or its task vectors.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from icmlora.adapter.layout import ModuleShape
from icmlora.adapter.model import Adapter
from icmlora.errors import CodeError, DataError, located
from icmlora.fleet.cards import Provenance, card_text, original_card
from icmlora.fleet.context import Context, with_files
from icmlora.formats.catalogue import format_named
from icmlora.formats.format import AdapterBytes, AdapterFormat, write_adapter_folder
from icmlora.formats.peft import PEFT
from icmlora.generator.codec import Codec
from icmlora.generator.residual_codec import ResidualCodec
from icmlora.generator.versions import GeneratorFile
from icmlora.io.staging import check_free
from registry.errors import DamagedStore
from registry.evaluations import latest
from registry.records import AdapterRecord, CodeRecord, GeneratorRecord, TaskRecord

if TYPE_CHECKING:
    from registry.evaluations import Subject
    from registry.store import Store


def decode_rung(
    store: Store, generator_file: GeneratorFile, code: CodeRecord, rung: Literal["residual", "code"]
) -> Adapter:
    """Read a code from disk, and its residual for the rung of that name, and decode them.

    Args:
        store: The open store.
        generator_file: The versions of the code's generator; the code names one of them.
        code: The code; it has a residual if one is asked for.
        rung: Which of the two.

    Raises:
        DamagedStore: Bytes that are not those that were stored.
        CodeError: Bytes that cannot be decoded.
        GeneratorError: The version's network cannot be read.
    """
    data = store.blobs.read(code.blob)
    codec = generator_file.codec_of(data)
    if rung == "code" or code.residual is None:
        return codec.decode(data)
    return ResidualCodec(codec).decode(data, store.blobs.read(code.residual.blob))


def codec_at(
    store: Store, generator_file: GeneratorFile, code: CodeRecord | None, layout: Sequence[ModuleShape]
) -> Codec:
    """Return the codec of the version that a task's code names; without a readable code, of the newest that covers it.

    Args:
        store: The open store.
        generator_file: The versions of its generator.
        code: The task's code under it, if it has one.
        layout: The modules of its adapter.

    Raises:
        NotCovered: It has no code, and no version covers the adapter.
        GeneratorError: The version's network cannot be read.
    """
    try:
        return (
            generator_file.codec_for(layout) if code is None else generator_file.codec_of(store.blobs.read(code.blob))
        )
    except (CodeError, DamagedStore):
        return generator_file.codec_for(layout)


Source = Literal["auto", "original", "residual", "code", "generate"]
Rung = Literal["original", "residual", "code", "generate"]

_BETTER = "`--source original` loses nothing; `icm train` with a higher --quality makes better codes"


@dataclass(frozen=True)
class MaterializeRequest:
    """What `icm materialize` was asked for."""

    task: str
    directory: Path
    source: Source = "auto"
    dtype: str = "bfloat16"
    seed: int | None = None
    """Samples the latent; for `generate`, which `auto` then means."""
    force: bool = False
    max_error: float | None = None


@dataclass(frozen=True)
class Materialized:
    """What was written; None where a figure was not measured."""

    task: str
    directory: Path
    rung: Rung
    generator: str | None
    dw_error: float | None
    retained_gain: float | None
    weights: str
    """SHA-256 of the written weights."""


class TooLossy(DataError):
    """The adapter would lose more than was allowed; nothing was written."""


def materialize(context: Context, request: MaterializeRequest) -> Materialized:
    """Write an adapter; the folder appears complete or not at all, and the same request gives the same bytes.

    Raises:
        TaskNotFound: No such task.
        DataError: The source that was asked for is not there.
        TooLossy: Above `max_error`.
        OutputExists: The folder is not empty and `force` is not given.
    """
    with context.open(read_only=True) as store:
        return write_rung(store, request)


def write_rung(
    store: Store, request: MaterializeRequest, seen: Subject | None = None, adapter_format: AdapterFormat | None = None
) -> Materialized:
    """Do what `materialize` does, in a store that is open already.

    Args:
        store: The open store.
        request: What is asked for.
        seen: What to write, as it was read before; without it what the task has now.
        adapter_format: The format to write a decoded adapter in; None for that of the task's original.

    Raises:
        MissingBlob: A file is gone: the store is damaged or, where `seen` is given, perhaps another one is there now.
    """
    check_free(request.directory, force=request.force)
    if seen is not None:
        return _write(store, store.tasks.get(request.task), seen, request, adapter_format)
    return with_files(lambda: _present(store, request.task), lambda row: _write(store, *row, request, adapter_format))


def _present(store: Store, name: str) -> tuple[TaskRecord, Subject]:
    """Return a task and what there is of it."""
    from registry.evaluations import Subject

    task, final = store.tasks.get(name), store.tasks.final(name)
    generator = store.generators.current(task.base_model)
    return task, Subject(final, generator, None if generator is None else store.codes.get(name, generator.id))


def _write(
    store: Store, task: TaskRecord, seen: Subject, request: MaterializeRequest, adapter_format: AdapterFormat | None
) -> Materialized:
    final, generator, code = seen.final, seen.generator, seen.code
    rung = _choose(request, final, code, generator)
    if rung == "original" or generator is None:
        return _write_original(store, task, final, request)
    provenance = _provenance(store, task, final, rung, generator, code, request.seed)
    check_error(provenance, request.max_error, hint=_BETTER)
    adapter = _decode(store, final, rung, code, generator, request.seed)
    return write_decoded(adapter, provenance, request, adapter_format or format_named(final.format))


def _choose(
    request: MaterializeRequest, final: AdapterRecord, code: CodeRecord | None, generator: GeneratorRecord | None
) -> Rung:
    """Return the rung that is asked for; `auto` is the best there is, the original as long as the store has it."""
    source = request.source
    if source == "auto":
        without: Rung = "code" if code is None else code.rung
        kept: Rung = without if final.is_evicted else "original"
        source = kept if request.seed is None else "generate"
    if source == "original" and final.is_evicted:
        hint = "`icm ingest --restore PATH` of it brings it back; `--source code` gives what the store kept"
        raise DataError(f"the original of task {request.task!r} was evicted at {final.evicted_at}", hint=hint)
    if source in ("code", "residual") and code is None:
        trains = "icm train" if generator is None else "icm train --update"
        raise DataError(f"task {request.task!r} has no code", hint=f"`{trains}` makes it")
    if source == "residual" and code is not None and code.residual is None:
        hint = "its code kept what was asked for, or nothing was: `icm encode --residual` makes one"
        raise DataError(f"task {request.task!r} has no residual", hint=hint)
    if source == "generate" and generator is None:
        raise DataError(f"there is no generator for task {request.task!r}", hint="`icm train` makes it")
    return source


def _provenance(
    store: Store,
    task: TaskRecord,
    final: AdapterRecord,
    rung: Literal["residual", "code", "generate"],
    generator: GeneratorRecord,
    code: CodeRecord | None,
    seed: int | None,
) -> Provenance:
    """Gather what is known of an adapter; of one that is sampled nothing was measured."""
    measured = None if seed is not None else latest(store.evaluations.all(task.name), task, rung, generator)
    error, gain = (None, None) if measured is None else (measured.dw_error, measured.retained_gain)
    if code is not None and rung != "generate":
        error = code.dw_error if rung == "code" else code.best_error
    return Provenance(task.name, task.base_model, rung, generator, error, gain, seed, final.is_generated)


def check_error(provenance: Provenance, limit: float | None, *, hint: str) -> None:
    """Refuse an adapter whose error is above a limit, or unknown where there is a limit.

    Raises:
        TooLossy: With the hint that is given.
    """
    error = provenance.dw_error
    if limit is None or (error is not None and error <= limit):
        return
    fact = "was not measured" if error is None else f"is {error:.4f}"
    raise TooLossy(f"the relative dW error of {provenance.task!r} {fact}, and {limit} is allowed", hint=hint)


def _decode(
    store: Store,
    final: AdapterRecord,
    rung: Literal["residual", "code", "generate"],
    code: CodeRecord | None,
    generator: GeneratorRecord,
    seed: int | None,
) -> Adapter:
    # torch is imported here: writing an original back needs none.

    from icmlora.adapter.layout import ModuleShape
    from icmlora.fleet.adapter_source import mean_vectors
    from icmlora.generator.versions import GeneratorFile

    generator_file = GeneratorFile(store.blobs.read(generator.blob))
    if code is not None and rung != "generate":
        return decode_rung(store, generator_file, code, rung)
    vectors = mean_vectors(store, store.vectors.all(final.task))
    if not vectors:
        raise DataError(f"task {final.task!r} has no task vector", hint="`icm vectors` makes it")
    layout = [ModuleShape(*entry) for entry in final.layout]
    codec = codec_at(store, generator_file, code, layout)
    config = format_named(final.format).read_config(store.blobs.read(final.config))
    return codec.generate(vectors, layout, task_type=config.task_type, seed=seed)


def write_decoded(
    adapter: Adapter, provenance: Provenance, request: MaterializeRequest, adapter_format: AdapterFormat = PEFT
) -> Materialized:
    """Write an adapter that a generator made, with its card; the same arguments give the same bytes."""
    card, metadata = card_text(provenance), provenance.metadata()
    with located(request.directory):
        files = adapter_format.encode(adapter, dtype=request.dtype, card=card, metadata=metadata)
    write_adapter_folder(request.directory, adapter_format, files, force=request.force)
    digest = hashlib.sha256(files.weights).hexdigest()
    p = provenance
    return Materialized(p.task, request.directory, p.rung, p.generator.blob, p.dw_error, p.retained_gain, digest)


def _write_original(store: Store, task: TaskRecord, final: AdapterRecord, request: MaterializeRequest) -> Materialized:
    if final.card is None:
        card = original_card(task.name, task.base_model, final.weights).encode()
    else:
        card = store.blobs.read(final.card)
    files = AdapterBytes(store.blobs.read(final.weights), store.blobs.read(final.config), card)
    write_adapter_folder(request.directory, format_named(final.format), files, force=request.force)
    return Materialized(task.name, request.directory, "original", None, 0.0, 1.0, final.weights)
