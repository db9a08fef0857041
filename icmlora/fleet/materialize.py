"""Write a task's adapter as a folder, or load it: from its original, its code, or its task vectors.

    original   the bytes that were ingested, unchanged
    residual   the code, corrected by its residual
    code       the code alone
    generate   what the task vectors bring back: the code of the known task that is recognised in them
    network    what the network alone predicts from the task vectors

torch is imported only to decode or to load: an original is written as it is.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from icmlora.errors import DataError, located
from icmlora.fleet.context import Context
from icmlora.formats.catalogue import format_named
from icmlora.formats.format import AdapterBytes, write_adapter_folder
from icmlora.io.staging import check_free
from registry.records import WithRelativeError

if TYPE_CHECKING:
    from icmlora.adapter.model import Adapter
    from icmlora.fleet.cards import Provenance
    from icmlora.fleet.decoding import OriginalForm
    from registry.records import AdapterRecord, CodeRecord, GeneratorRecord, TaskRecord
    from registry.store import Store

Decoded = Literal["residual", "code", "generate", "network"]
Source = Literal["auto", "original", "residual", "code", "generate", "network"]

_BETTER = "`--source original` is exact; `icm train` with a higher --quality makes better codes"


@dataclass(frozen=True, kw_only=True)
class LoadRequest:
    """Which adapter to read."""

    task: str
    source: Source = "auto"
    seed: int | None = None
    max_error: float | None = None


@dataclass(frozen=True, kw_only=True)
class MaterializeRequest(LoadRequest):
    """Which adapter to write, and where."""

    directory: Path
    dtype: str | None = None  # of decoded factors; None for that of the original
    pad_rank: int | None = None  # one rank for all modules, for engines; None for the ranks of the original
    force: bool = False


@dataclass(frozen=True)
class MaterializeReport(WithRelativeError):
    """What was written."""

    task: str
    directory: Path
    source: Literal["original", Decoded]
    generator: str | None  # digest of the generator that decoded it; None for an original
    squared_error: float | None  # None if it was not measured
    retained_gain: float | None  # as `icm eval` measured it
    weights: str  # SHA-256 of the written weights
    recognized: str | None = None  # of `generate`: the task whose code it is; None for what the network predicts


class TooLossy(DataError):
    """The adapter's relative error is above the limit, or was not measured; nothing was written."""


def materialize(context: Context, request: MaterializeRequest) -> MaterializeReport:
    """Write an adapter as a folder, which appears complete or not at all. The same request gives the same bytes."""
    check_free(request.directory, force=request.force)
    with context.open(read_only=True) as store:
        stored = _read_rows(store, request)
        source = _choose_source(request, stored)
        if source == "original":
            return _write_original(store, stored, request)
        from icmlora.fleet.decoding import read_form

        provenance = _provenance(store, stored, source, request)
        adapter = _decode(store, stored, source, request.seed)
        form = read_form(store, stored.final)
    return write_decoded(adapter, provenance, request, form)


def load(context: Context, request: LoadRequest) -> Adapter:
    """Read an adapter into memory: float32, with the scale folded into B. Raises as `materialize` does."""
    with context.open(read_only=True) as store:
        stored = _read_rows(store, request)
        source = _choose_source(request, stored)
        if source == "original":
            from icmlora.fleet.loading import read_original

            return read_original(store, stored.final)
        _provenance(store, stored, source, request)
        return _decode(store, stored, source, request.seed)


@dataclass(frozen=True)
class _Stored:
    """What the store has of one task."""

    task: TaskRecord
    final: AdapterRecord
    generator: GeneratorRecord | None
    code: CodeRecord | None
    exemplar: CodeRecord | None = None  # for source `generate`: the code that the task's vectors bring back


def _read_rows(store: Store, request: LoadRequest) -> _Stored:
    """Read the rows of a task; its generator and code are left out if the original is what will be used."""
    task = store.tasks.get(request.task)
    final = store.tasks.final(task.name)
    use_original = request.source == "auto" and request.seed is None and not final.is_evicted
    if use_original or request.source == "original":
        return _Stored(task, final, None, None)
    generator = store.generators.current(task.base_model)
    code = None if generator is None else store.codes.get(task.name, generator.id)
    if request.source != "generate" or generator is None or final.original_only is not None:
        return _Stored(task, final, generator, code)
    from icmlora.fleet.exemplars import Exemplars

    return _Stored(task, final, generator, code, Exemplars(store, generator).code_for(final))


def _choose_source(request: LoadRequest, stored: _Stored) -> Literal["original", Decoded]:
    """Return the source to use."""
    source, code, final = request.source, stored.code, stored.final
    task = repr(stored.task.name)
    if source not in get_args(Source):
        raise DataError(f"unknown source {source!r}", hint=f"choose one of {', '.join(get_args(Source))}")
    if request.seed is not None and source not in ("auto", "network"):
        raise DataError(f"source {source!r} has nothing to sample", hint="a seed is for source 'network' or 'auto'")
    if source == "auto" and request.seed is not None:
        source = "network"
    elif source == "auto":
        source = "original" if not final.is_evicted else "code" if code is None else code.rung
    if source == "original" and final.is_evicted:
        hint = "`icm ingest --restore PATH` brings it back; `--source code` decodes what the store still has"
        raise DataError(f"the original of task {task} was evicted at {final.evicted_at}", hint=hint)
    if source != "original" and final.original_only is not None:
        raise DataError(f"task {task} has its original only: {final.original_only}", hint="use `--source original`")
    if source in ("code", "residual") and code is None:
        train = "icm train" if stored.generator is None else "icm train --update"
        raise DataError(f"task {task} has no code", hint=f"run `{train}` to make one")
    if source == "residual" and code is not None and code.residual is None:
        hint = "a residual is only stored if a code misses its limits; `icm encode --residual` makes one"
        raise DataError(f"task {task} has no residual", hint=hint)
    if source in ("generate", "network") and stored.generator is None:
        raise DataError(f"there is no generator for task {task}", hint="run `icm train` to make one")
    return source


def _provenance(store: Store, stored: _Stored, source: Decoded, request: LoadRequest) -> Provenance:
    """Gather what is known of an adapter before it is decoded."""
    task, generator, code = stored.task, _generator_of(stored), stored.code
    error = gain = None
    if request.seed is None:  # nothing was measured of a sampled adapter
        from registry.evaluations import latest

        measured = latest(store.evaluations.all(task.name), task, source, generator)
        if measured is not None:
            error, gain = measured.squared_error, measured.retained_gain
    if code is not None and source in ("code", "residual"):
        error = code.squared_error if source == "code" else code.best_squared_error
    if stored.exemplar is not None and stored.exemplar.task == task.name:
        error = stored.exemplar.squared_error
    from icmlora.fleet.cards import Provenance

    provenance = Provenance(
        task.name,
        task.base_model,
        source,
        generator,
        error,
        gain,
        request.seed,
        stored.final.is_generated,
        None if stored.exemplar is None else stored.exemplar.task,
    )
    check_error(provenance, request.max_error, hint=_BETTER)
    return provenance


def check_error(provenance: Provenance, limit: float | None, *, hint: str) -> None:
    """Refuse an adapter whose error is above a limit, or was not measured although there is a limit."""
    error = provenance.relative_error
    if limit is None or (error is not None and error <= limit):
        return
    found = "was not measured" if error is None else f"is {error:.4f}"
    raise TooLossy(f"the relative error of {provenance.task!r} {found}, but the limit is {limit}", hint=hint)


def _decode(store: Store, stored: _Stored, source: Decoded, seed: int | None) -> Adapter:
    from icmlora.fleet.decoding import decode_code, predict_adapter
    from icmlora.generator.versions import GeneratorFile

    generator_file = GeneratorFile(store.blobs.read(_generator_of(stored).blob))
    if source == "generate" and stored.exemplar is not None:
        return decode_code(store, generator_file, stored.exemplar, "code")
    if stored.code is not None and source in ("code", "residual"):
        return decode_code(store, generator_file, stored.code, source)
    return predict_adapter(store, generator_file, stored.final, stored.code, seed=seed)


def _generator_of(stored: _Stored) -> GeneratorRecord:
    assert stored.generator is not None  # `_choose_source` has checked it
    return stored.generator


def write_decoded(
    adapter: Adapter, provenance: Provenance, request: MaterializeRequest, form: OriginalForm
) -> MaterializeReport:
    """Write a decoded adapter with its model card; the same arguments give the same bytes."""
    from icmlora.fleet.cards import card_text

    with located(request.directory):
        files = form.format.encode(
            adapter,
            card=card_text(provenance),
            metadata=provenance.metadata(),
            like=form.template,
            dtype=request.dtype,
            pad_rank=request.pad_rank,
            extras=form.tensors,
        )
    files = replace(files, companions=form.files)
    write_adapter_folder(request.directory, form.format, files, force=request.force)
    digest = hashlib.sha256(files.weights).hexdigest()
    p = provenance
    return MaterializeReport(
        p.task, request.directory, p.source, p.generator.blob, p.squared_error, p.retained_gain, digest, p.recognized
    )


def _write_original(store: Store, stored: _Stored, request: MaterializeRequest) -> MaterializeReport:
    task, final = stored.task, stored.final
    if final.card is None:
        from icmlora.fleet.cards import original_card

        card = original_card(task.name, task.base_model, final.weights).encode()
    else:
        card = store.blobs.read(final.card)
    weights, config = store.blobs.read(final.weights), store.blobs.read(final.config)
    companions: dict[str, bytes] = {}
    if final.extras:
        from icmlora.fleet.decoding import read_companions

        companions = read_companions(store, final)
    files = AdapterBytes(weights, config, card, companions)
    write_adapter_folder(request.directory, format_named(final.format), files, force=request.force)
    return MaterializeReport(task.name, request.directory, "original", None, 0.0, 1.0, final.weights)
