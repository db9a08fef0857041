"""Write a task's adapter as a folder or file, or load it: from its original, its code, or its task vectors.

    original   the bytes that were ingested, unchanged
    residual   the code, corrected by its residual
    code       the code alone
    generate   what the task vectors bring back: the code of the known task that is recognised in them
    network    what the network alone predicts from the task vectors

torch is imported only to decode, to convert or to load: an original is written as it is.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from icmlora.adapter.layout import ModuleShape
from icmlora.errors import DataError
from icmlora.fleet.context import Context, locate_base, use_case
from icmlora.formats.catalogue import format_named
from icmlora.formats.format import AdapterBytes, AdapterFormat, check_target, write_adapter_files
from registry.errors import DamagedStore
from registry.records import Claim, WithRelativeError, relative_error

if TYPE_CHECKING:
    from icmlora.adapter.model import Adapter
    from icmlora.base_models.finding.lookup import FoundBase
    from icmlora.fleet.resources.decoding import OriginalForm
    from icmlora.fleet.write.cards import Provenance
    from registry.records import AdapterRecord, CodeRecord, EvaluationRecord, GeneratorRecord, TaskRecord
    from registry.store import Store

Decoded = Literal["residual", "code", "generate", "network"]
Source = Literal["auto", "original", "residual", "code", "generate", "network"]

_SIDE_BY_SIDE = 32
"""Adapters that `load_many` has in memory at a time."""
_BETTER = "`--source original` is exact; `icm train` with a higher --quality makes better codes"


@dataclass(frozen=True, kw_only=True)
class LoadRequest:
    """Which adapter to read."""

    task: str
    source: Source = "auto"
    seed: int | None = None
    max_error: float | None = None


@dataclass(frozen=True, kw_only=True)
class FilesRequest(LoadRequest):
    """Which adapter to make, and the form of its files."""

    dtype: str | None = None  # of decoded factors; None for that of the original
    pad_rank: int | None = None  # one rank for all modules, for engines; None for the ranks of the original


@dataclass(frozen=True, kw_only=True)
class MaterializeRequest(FilesRequest):
    """Which adapter to write, and where."""

    directory: Path  # or the file, of a format of single files
    adapter_format: str | None = None  # None for the adapter's own
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
    adapter_format: str = "peft"  # in which it was written
    converted: bool = False  # from another one
    left_out: tuple[str, ...] = ()  # files that came with the original and have no place in this format
    precision: str | None = None  # of the base model that the gain was measured on
    claim: Claim | None = None  # of the bundle that its code came in


class TooLossy(DataError):
    """The adapter's relative error is above the limit, or was not measured; nothing was written."""


@dataclass(frozen=True, eq=False)
class MadeFiles:
    """An adapter as the files of its format, in memory."""

    task: str
    format: AdapterFormat
    content: AdapterBytes
    provenance: Provenance | None  # None for an original
    initial: bytes | None = None  # of an original: what its training took out of the base model

    @property
    def by_name(self) -> dict[str, bytes]:
        """File name -> content; the file that makes the adapter valid comes last."""
        return self.format.lay_out(self.content, self.task)

    def write(self, output: Path, *, force: bool) -> MaterializeReport:
        """Write the files as a folder, or as a single file where the format has those; completely, or not at all."""
        write_adapter_files(output, self.format, self.content, self.task, force=force)
        digest = hashlib.sha256(self.content.weights).hexdigest()
        return self._report(output, digest, (0.0, 1.0))

    def convert(
        self, output: Path, target: AdapterFormat, find_base: Callable[[], FoundBase], *, dtype: str | None, force: bool
    ) -> MaterializeReport:
        """Write the adapter in another format than its own; `find_base` is called if its base model is needed."""
        from icmlora.fleet.write.format_pairs import SourceAdapter, convert_content

        own = {"icm_task": self.task, "icm_rung": "original"}
        metadata = own if self.provenance is None else self.provenance.metadata()
        # What is converted is the adapter that `write` would write, with its rounded factors.
        source = SourceAdapter(self.task, self.format, self.content, find_base, path=output, initial=self.initial)
        content = convert_content(source, target, metadata=metadata, dtype=dtype or "float32")
        write_adapter_files(output, target, content, self.task, force=force)
        is_rounded = dtype not in (None, "float32")  # nobody measures by how much
        digest = hashlib.sha256(content.weights).hexdigest()
        report = self._report(output, digest, (None, None) if is_rounded else (0.0, 1.0))
        left_out = tuple(name for name in self.content.companions if name not in content.companions)
        return replace(report, adapter_format=target.name, converted=True, left_out=left_out)

    def _report(self, output: Path, digest: str, of_original: tuple[float | None, float | None]) -> MaterializeReport:
        p = self.provenance
        if p is None:
            known = *of_original, digest, None, self.format.name
            return MaterializeReport(self.task, output, "original", None, *known)
        figures = p.squared_error, p.retained_gain, digest, p.recognized, self.format.name
        made = MaterializeReport(self.task, output, p.source, p.generator.blob, *figures)
        return replace(made, precision=p.precision, claim=p.claim)


def materialize(context: Context, request: MaterializeRequest) -> MaterializeReport:
    """Write an adapter, which appears complete or not at all. The same request gives the same bytes."""
    output, wanted, force = request.directory, request.adapter_format, request.force
    if wanted is None:
        check_target(output, force=force)
        return make_files(context, request).write(output, force=force)
    from icmlora.fleet.write.format_pairs import check_pair, format_to_write

    target = format_to_write(wanted)
    check_target(output, target, as_file=True, force=force)
    with context.open(read_only=True) as store:
        task = store.tasks.get(request.task)
        own = format_named(store.tasks.final(task.name).format)
    if own.name == target.name:
        return make_files(context, request).write(output, force=force)
    check_pair(own, target)

    def find_base() -> FoundBase:
        with context.open(read_only=True) as store:
            return locate_base(store, task.base_model)

    made = make_files(context, replace(request, dtype=None))
    return made.convert(output, target, find_base, dtype=request.dtype, force=force)


def make_files(context: Context, request: FilesRequest) -> MadeFiles:
    """Make the files of an adapter in memory. The same request gives the same bytes."""
    with context.open(read_only=True) as store:
        stored = _read_rows(store, request)
        source = _choose_source(request, stored)
        if source == "original":
            return _original_files(store, stored)
        from icmlora.fleet.resources.decoding import read_form

        provenance = _provenance(store, stored, source, request)
        adapter = _decode(context, store, stored, source, request.seed)()
        form = read_form(store, stored.final)
    return encode_files(adapter, provenance, request, form)


def load(context: Context, request: LoadRequest) -> Adapter:
    """Read an adapter into memory: float32, with the scale folded into B. Raises as `materialize` does."""
    with context.open(read_only=True) as store:
        return _reader(context, store, request)()


@use_case
def load_many(
    context: Context, tasks: Sequence[str], *, source: Source = "auto", device: str = "cpu"
) -> Iterator[tuple[str, Adapter]]:
    """Load the adapters of many tasks, as `load` does: (name, adapter) in the order of `tasks`.

    The store and the generator are opened once, and several codes are decoded side by side, on the CPU, whose
    results do not depend on the machine; then the factors go to the device. At most 32 adapters are in memory
    besides those that the caller keeps.

    Args:
        context: The store.
        tasks: Names of tasks.
        source: As for `materialize`.
        device: Where the factors are put.
    """
    from icmlora.io.devices import resolve_device
    from icmlora.io.threads import side_by_side

    place = resolve_device(device)
    with context.open(read_only=True) as store, side_by_side() as each:
        for first in range(0, len(tasks), _SIDE_BY_SIDE):
            names = tasks[first : first + _SIDE_BY_SIDE]
            readers = [_reader(context, store, LoadRequest(task=name, source=source)) for name in names]
            adapters = each(lambda read: read().to(place), readers)
            yield from zip(names, adapters, strict=True)


def _reader(context: Context, store: Store, request: LoadRequest) -> Callable[[], Adapter]:
    """Read what an adapter is made from, and return what makes it, on any thread."""
    stored = _read_rows(store, request)
    source = _choose_source(request, stored)
    if source == "original":
        from icmlora.fleet.resources.loading import original_reader

        return original_reader(store, stored.final)
    _provenance(store, stored, source, request)
    return _decode(context, store, stored, source, request.seed)


@dataclass(frozen=True)
class Plan:
    """What `materialize` would write of a task.

    Attributes:
        task: Its name, as the store spells it.
        base_model: The name of its base model.
        source: Where the adapter would come from.
        key: SHA-256 of everything that its weights and configuration follow from.
        layout: Its modules; empty where there can be no code.
    """

    task: str
    base_model: str
    source: Literal["original", Decoded]
    key: str
    layout: tuple[ModuleShape, ...]


def plan(context: Context, name: str) -> Plan | None:
    """Say what `materialize` would write of a task, or None if there is none of that name; a few rows are read."""
    with context.open(read_only=True) as store:
        if (task := store.tasks.find(name)) is None:
            return None
        request = LoadRequest(task=task.name)
        stored = _read_rows(store, request)
    source = _choose_source(request, stored)
    final, code = stored.final, stored.code
    facts: dict[str, object] = {"task": task.name, "source": source, "config": final.config, "format": final.format}
    if source == "original":
        facts["weights"] = final.weights
    else:
        facts |= {"generator": _generator_of(stored).blob, "code": [] if code is None else code.digests()}
        facts |= {"dtype": final.dtype, "template": final.template, "layout": [*map(list, final.layout)]}
    facts["extras"] = [[extra.file, extra.blob] for extra in final.extras]
    layout = tuple(ModuleShape(*entry) for entry in final.layout)
    return Plan(task.name, task.base_model, source, key_of(facts), layout)


def key_of(facts: Mapping[str, object]) -> str:
    """Return the SHA-256 of what an adapter's files follow from, this icm included."""
    return hashlib.sha256(json.dumps({"icm": _icm(), **facts}, sort_keys=True).encode()).hexdigest()


@cache
def _icm() -> str:
    return version("icm-lora")


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
    from icmlora.fleet.resources.recalled_code import Exemplars

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
        brings = "`icm ingest PATH` stores it" if final.was_never_here else "`icm ingest --restore PATH` brings it back"
        hint = f"{brings}; `--source code` decodes what the store still has"
        fact = (
            "was never here: a bundle brought its code"
            if final.was_never_here
            else f"was evicted at {final.evicted_at}"
        )
        raise DataError(f"the original of task {task} {fact}", hint=hint)
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
    error = gain = precision = None
    if request.seed is None:  # nothing was measured of a sampled adapter
        measured = _measured(store, task, source, generator)
        if measured is not None:
            error, gain, precision = measured.squared_error, measured.retained_gain, measured.precision
    if code is not None and source in ("code", "residual"):
        error = code.squared_error if source == "code" else code.best_squared_error
    if stored.exemplar is not None and stored.exemplar.task == task.name:
        error = stored.exemplar.squared_error
    from icmlora.fleet.write.cards import Provenance

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
        precision,
        code.claim if code is not None and source == "code" else None,
    )
    check_error(task.name, error, request.max_error, hint=_BETTER, claim=provenance.claim)
    return provenance


def _measured(store: Store, task: TaskRecord, source: Decoded, generator: GeneratorRecord) -> EvaluationRecord | None:
    """Return how a source does; None if nobody measured it, or if that is damaged: it takes no figures to write one."""
    from registry.tables.evaluations import latest

    try:
        return latest(store.evaluations.all(task.name), task, source, generator)
    except DamagedStore:  # `icm verify` reports it
        return None


def check_error(
    task: str, squared_error: float | None, limit: float | None, *, hint: str, claim: Claim | None = None
) -> None:
    """Refuse an adapter whose error is above a limit, or was not measured here although there is a limit."""
    error = relative_error(squared_error)
    if limit is None or (error is not None and error <= limit):
        return
    found = "was not measured" if error is None else f"is {error:.4f}"
    if error is None and claim is not None and claim.relative_error is not None:
        found = f"was not measured here, only claimed to be {claim.relative_error:.4f} by its bundle"
    raise TooLossy(f"the relative error of {task!r} {found}, but the limit is {limit}", hint=hint)


def _decode(
    context: Context, store: Store, stored: _Stored, source: Decoded, seed: int | None
) -> Callable[[], Adapter]:
    from icmlora.fleet.resources.decoding import code_reader, predict_adapter

    generator_file = context.generator.get(_generator_of(stored).blob, store.blobs.read)
    if source == "generate" and stored.exemplar is not None:
        return code_reader(store, generator_file, stored.exemplar, "code")
    if stored.code is not None and source in ("code", "residual"):
        return code_reader(store, generator_file, stored.code, source)
    predicted = predict_adapter(store, generator_file, stored.final, stored.code, seed=seed)
    return lambda: predicted


def _generator_of(stored: _Stored) -> GeneratorRecord:
    assert stored.generator is not None  # `_choose_source` has checked it
    return stored.generator


def encode_files(adapter: Adapter, provenance: Provenance, request: FilesRequest, form: OriginalForm) -> MadeFiles:
    """Make the files of a decoded adapter with its model card; the same arguments give the same bytes."""
    from icmlora.fleet.write.cards import card_text

    files = form.format.encode(
        adapter,
        card=card_text(provenance),
        metadata=provenance.metadata(),
        like=form.template,
        dtype=request.dtype,
        pad_rank=request.pad_rank,
        extras=form.tensors,
    )
    return MadeFiles(provenance.task, form.format, replace(files, companions=form.files), provenance)


def _original_files(store: Store, stored: _Stored) -> MadeFiles:
    task, final = stored.task, stored.final
    if final.card is None:
        from icmlora.fleet.write.cards import original_card

        card = original_card(task.name, task.base_model, final.weights).encode()
    else:
        card = store.blobs.read(final.card)
    content = replace(original_files(store, final), card=card)
    initial = None if final.initial is None else store.blobs.read(final.initial)
    return MadeFiles(task.name, format_named(final.format), content, None, initial)


def original_files(store: Store, row: AdapterRecord, weights: bytes | None = None) -> AdapterBytes:
    """Read the files of an original as they were ingested, without the card; weights that are at hand are not read."""
    companions: dict[str, bytes] = {}
    if row.extras:
        from icmlora.fleet.resources.decoding import read_companions

        companions = read_companions(store, row)
    return AdapterBytes(
        store.blobs.read(row.weights) if weights is None else weights, store.blobs.read(row.config), None, companions
    )
