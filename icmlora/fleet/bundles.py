"""Write the generator of one base model with the codes of chosen tasks into one file, to be used without the store.

Use a bundle where there is no store: list what is in it, and write an adapter from it.

Take what a bundle holds into a store: generator, codes and tasks, without their originals.

    bundle --check every byte--> --decide--> blobs, durable --> one transaction: generator, tasks, codes

Until the transaction the store is as it was; a killed import leaves blobs without rows, which `icm prune` removes.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from icmlora.adapter.layout import ModuleShape
from icmlora.bundle.file import Bundle, bundle_digest, bundle_size, open_bundle, write_bundle
from icmlora.bundle.index import (
    MAX_CARD_BYTES,
    BundledGenerator,
    BundledMeasurement,
    BundledTask,
    BundleIndex,
    BundlePart,
)
from icmlora.errors import BundleError, CodeError, DataError
from icmlora.fleet.cards import Provenance
from icmlora.fleet.context import Context, Event, Progress, as_it_is_now, check_base_model
from icmlora.fleet.materialize import MaterializeRequest, check_error, write_decoded
from icmlora.formats.peft_config import AdapterConfig
from icmlora.io.staging import check_absent, check_free
from registry.bundles import Arrival, ArrivalOutcome, ArrivingTask
from registry.errors import CodeChanged, MissingBlob, StoreNotFound
from registry.evaluations import latest
from registry.records import EvaluationRecord, GeneratorRecord, NewAdapter, NewEvaluation, NewGenerator, TaskSummary

if TYPE_CHECKING:
    from icmlora.fleet.materialize import Materialized
    from icmlora.generator.versions import GeneratorFile
    from registry.store import Store

_ATTEMPTS = 3
"""An `icm encode` beside this one replaces a code every few seconds, and all have to be there at one time."""


@dataclass(frozen=True)
class ExportRequest:
    """What `icm export` was asked for."""

    file: Path
    names: Sequence[str] = ()
    """Tasks; all that have a code if there is none."""
    base_model: str | None = None
    force: bool = False


@dataclass(frozen=True)
class Exported:
    """What was written."""

    file: Path
    digest: str
    """Stands for the whole file."""
    size: int
    index: BundleIndex
    left_out: tuple[str, ...]
    """Tasks that nobody named and that have no code."""
    without_residual: tuple[str, ...]
    """Tasks whose residual stays behind: a bundle carries codes."""


@dataclass(frozen=True)
class _Choice:
    generator: GeneratorRecord
    rows: Sequence[TaskSummary]
    left_out: tuple[str, ...]


def export(context: Context, request: ExportRequest) -> Generator[Event, None, Exported]:
    """Write a bundle. Every byte is checked as it is read; the file appears complete or not at all.

    Raises:
        TaskNotFound: A name is not in the store.
        DataError: A task has no code under the current generator, the tasks have several base models, or none belongs
            to the one that is asked for.
        CodeChanged: Another process replaced codes while they were read, again and again.
        DamagedStore: A blob is missing or damaged.
        OutputExists: The file exists and `force` is not given.
    """
    check_absent(request.file, force=request.force)
    with context.open(read_only=True) as store:
        choice = _choose(store, request)
        for _ in range(_ATTEMPTS):
            try:
                return (yield from _write(store, choice, request))
            except MissingBlob as missing:
                choice = as_it_is_now(lambda: _choose(store, request), choice, missing)
    fact = f"another icm replaced codes while they were read, {_ATTEMPTS} times in a row"
    raise CodeChanged(fact, hint="run the same command again when that one is done")


def _write(store: Store, choice: _Choice, request: ExportRequest) -> Generator[Event, None, Exported]:
    index = _index(store, choice)
    codes = {task.code: task.name for task in index.tasks}
    known = _digests(store, choice.generator)
    parts = write_bundle(request.file, index, lambda digest: _read(store, digest, known, codes), force=request.force)
    for done, part in enumerate(parts, 1):
        yield Progress(done, len(index.parts), codes.get(part.digest, ""))
    bare = tuple(row.task.name for row in choice.rows if row.code is not None and row.code.residual is not None)
    return Exported(request.file, bundle_digest(index), bundle_size(index), index, choice.left_out, bare)


def _choose(store: Store, request: ExportRequest) -> _Choice:
    """Find the tasks that are meant and the one generator that all their codes belong to."""
    named = {store.tasks.get(name).name for name in request.names}
    rows = [row for row in store.tasks.summaries() if not named or row.task.name in named]
    check_base_model(request.base_model, {row.task.base_model for row in rows}, named=bool(named))
    rows = [row for row in rows if request.base_model in (None, row.task.base_model)]
    coded = [row for row in rows if row.code is not None]
    without = tuple(row.task.name for row in rows if row.code is None)
    if named and without:
        fact = f"no code under the current generator: {', '.join(without)}"
        raise DataError(fact, hint="`icm train --update` makes theirs; or export the others alone")
    bases = sorted({row.task.base_model for row in coded})
    if len(bases) > 1:
        hint = "choose one with --base-model NAME, or name tasks of one"
        raise DataError(
            f"a bundle has one base model, and these tasks have {len(bases)}: {', '.join(bases)}", hint=hint
        )
    generator = store.generators.current(bases[0]) if bases else None
    if generator is None:
        raise DataError("no task has a code that could be exported", hint="`icm train` makes codes")
    if any(row.code is None or row.code.generator_id != generator.id for row in coded):
        raise DataError("another icm made a new generator meanwhile", hint="run the same command again")
    return _Choice(generator, coded, without)


def _index(store: Store, choice: _Choice) -> BundleIndex:
    generator = choice.generator
    tasks = [_task(store, row, generator) for row in choice.rows]
    digests = dict.fromkeys([generator.blob, *(digest for task in tasks for digest in task.parts)])
    return BundleIndex(
        base_model=generator.base_model,
        generator=BundledGenerator(generator.blob, generator.version, dict(generator.config), dict(generator.metrics)),
        tasks=tuple(sorted(tasks, key=lambda task: task.name.lower())),
        parts=tuple(BundlePart(digest, store.blobs.size(digest)) for digest in digests),
    )


def _task(store: Store, row: TaskSummary, generator: GeneratorRecord) -> BundledTask:
    final, code = row.final, row.code
    if code is None:
        raise ValueError(f"{row.task.name} has no code")
    card = final.card if final.card is not None and store.blobs.size(final.card) <= MAX_CARD_BYTES else None
    return BundledTask(
        name=row.task.name,
        code=code.blob,
        dw_error=_float(code.dw_error),
        weights=final.weights,
        weights_size=final.weights_bytes,
        config=final.config,
        card=card,
        dtype=final.dtype,
        step=final.step,
        is_generated=final.is_generated,
        layout=tuple(ModuleShape(*entry) for entry in final.layout),
        measured=_measured(latest(store.evaluations.all(row.task.name), row.task, "code", generator)),
    )


def _measured(row: EvaluationRecord | None) -> BundledMeasurement | None:
    if row is None:
        return None
    return BundledMeasurement(
        data=row.data,
        nats_per_token=float(row.nats_per_token),
        tokens=row.tokens,
        utf8_bytes=row.utf8_bytes,
        retained_gain=_float(row.retained_gain),
        dw_error=_float(row.dw_error),
        settings=dict(row.settings),
    )


def _float(value: float | None) -> float | None:
    """SQLite gives a number back as it was written, and 0 is written differently from 0.0."""
    return None if value is None else float(value)


def _digests(store: Store, generator: GeneratorRecord) -> frozenset[str]:
    """Return what the codes of a generator may name."""
    from icmlora.generator.file import versions_of

    return frozenset(version.digest for version in versions_of(store.blobs.read(generator.blob)))


def _read(store: Store, digest: str, known: Collection[str], codes: Mapping[str, str]) -> bytes:
    """Read a part; a code must be one of the generator that goes with it."""
    from icmlora.generator.code import generator_of

    data = store.blobs.read(digest)
    if digest in codes and generator_of(data) not in known:
        fact = f"the code of {codes[digest]!r} belongs to another generator"
        raise CodeError(fact, hint="`icm train` makes it again")
    return data


_BETTER = "`icm train` with a higher --quality makes better codes; export those"


def read_index(path: Path) -> tuple[BundleIndex, str]:
    """Return what a bundle says of itself, and the digest that stands for the file; its parts are not read.

    Raises:
        BundleError: Not a bundle, damaged, or cut short.
        UnsafeInput: It breaks a limit.
    """
    with open_bundle(path) as bundle:
        return bundle.index, bundle.digest


def materialize_bundled(path: Path, request: MaterializeRequest) -> Materialized:
    """Write an adapter from its code in a bundle: the same bytes as from the code in the store.

    Every byte of the bundle is checked before anything is written.

    Raises:
        BundleError: The bundle is damaged, cut short, or of another format.
        DataError: It has no such task.
        TooLossy: Above the request's `max_error`.
        OutputExists: The folder is not empty and `force` is not given.
    """
    check_free(request.directory, force=request.force)
    with open_bundle(path) as bundle:
        index = bundle.index
        task = find_task(index, request.task)
        made_by = Provenance(
            task.name,
            index.base_model,
            "code",
            index.generator,
            task.dw_error,
            task.retained_gain,
            seed=None,
            is_generated=task.is_generated,
        )
        check_error(made_by, request.max_error, hint=_BETTER)
        bundle.check()
        generator_file, code = open_generator_file(bundle), bundle.read(task.code)
    return write_decoded(generator_file.codec_of(code).decode(code), made_by, request)


def open_generator_file(bundle: Bundle) -> GeneratorFile:
    """Take the generator of a bundle apart; the network of a version is opened with the first code that names it.

    Raises:
        GeneratorError: It is damaged, or of a newer format.
        BundleError: It is damaged, or made for another base model than the bundle says.
    """
    from icmlora.generator.versions import GeneratorFile

    generator_file = GeneratorFile(bundle.read(bundle.index.generator.blob))
    if generator_file.configs[0].base_model != bundle.index.base_model:
        raise BundleError("the bundle names another base model than its generator")
    return generator_file


def find_task(index: BundleIndex, name: str) -> BundledTask:
    """Return a task of a bundle by name, in any case.

    Raises:
        DataError: There is none; the hint names the closest one.
    """
    task = index.task(name)
    if task is None:
        close = difflib.get_close_matches(name, [task.name for task in index.tasks], n=1)
        hint = f"did you mean {close[0]!r}?" if close else "`icm ls --from FILE` lists its tasks"
        raise DataError(f"no task of the bundle is named {name!r}", hint=hint)
    return task


_BATCH_BYTES = 64 << 20


@dataclass(frozen=True)
class ImportRequest:
    """What `icm import` was asked for."""

    file: Path
    names: Sequence[str] = ()
    """Tasks of the bundle; all if there is none."""
    on_conflict: Literal["skip", "fail"] = "fail"
    dry_run: bool = False


@dataclass(frozen=True)
class Imported:
    """What was taken in, or would be."""

    index: BundleIndex
    digest: str
    """Stands for the whole bundle."""
    tasks: tuple[ArrivalOutcome, ...]


def take_in(context: Context, request: ImportRequest) -> Generator[Event, None, Imported]:
    """Record the tasks of a bundle with their codes, in a store that is made if there is none.

    Raises:
        BundleError: The bundle is damaged, cut short, of another format, or its parts contradict each other.
        DataError: It has no task of a name that was given.
        GeneratorConflict: The store uses another generator for this base model.
        TaskConflict: A task is in the store with another adapter, and `on_conflict` is `fail`.
    """
    with open_bundle(request.file) as bundle:
        index = bundle.index
        names = {find_task(index, name).name for name in request.names}
        tasks = [task for task in index.tasks if not names or task.name in names]
        yield Progress(0, None, "checking")
        bundle.check()
        _check_parts(bundle, tasks)
        arrival = _arrival(bundle, tasks, request)
        if request.dry_run:
            return Imported(index, bundle.digest, tuple(_plan(context, arrival)))
        with context.open(create=True) as store:
            planned = store.bundles.plan(arrival)
            new = {outcome.name.lower() for outcome in planned if outcome.status in ("added", "encoded")}
            yield from _put(store, bundle, [task for task in tasks if task.name.lower() in new])
            # Decided once more under the write lock, which sees what another process did meanwhile: a task that was to
            # be skipped may get its code after all, and then its bytes come out of the bundle.
            outcomes = store.bundles.take(arrival) if new else planned
    return Imported(index, bundle.digest, tuple(outcomes))


def _check_parts(bundle: Bundle, tasks: Sequence[BundledTask]) -> None:
    """Check what the format itself does not look into: every version opens, and codes and configurations go with it."""
    from icmlora.generator.code import generator_of

    index = bundle.index
    generator_file = open_generator_file(bundle)
    for number in range(len(generator_file.digests)):
        generator_file.codec(number)
    for task in tasks:
        if generator_of(bundle.read(task.code)) not in generator_file.digests:
            raise BundleError(f"the code of {task.name!r} belongs to another generator")
        if AdapterConfig.parse(bundle.read(task.config)).base_model != index.base_model:
            raise BundleError(f"the configuration of {task.name!r} names another base model")


def _plan(context: Context, arrival: Arrival) -> list[ArrivalOutcome]:
    try:
        with context.open(read_only=True) as store:
            return store.bundles.plan(arrival)
    except StoreNotFound:
        return [ArrivalOutcome(task.name, "added") for task in arrival.tasks]


def _put(store: Store, bundle: Bundle, tasks: Sequence[BundledTask]) -> Iterator[Event]:
    """Store the parts that some tasks need, a few at a time."""
    if not tasks:
        return
    digests = list(dict.fromkeys([bundle.index.generator.blob, *(part for task in tasks for part in task.parts)]))
    batch: list[bytes] = []
    for done, digest in enumerate(digests, 1):
        batch.append(bundle.read(digest))
        if done == len(digests) or sum(map(len, batch)) >= _BATCH_BYTES:
            store.blobs.put_all(batch)
            batch = []
            yield Progress(done, len(digests))


def _arrival(bundle: Bundle, tasks: Sequence[BundledTask], request: ImportRequest) -> Arrival:
    index = bundle.index
    generator = NewGenerator(index.base_model, index.generator.blob, index.generator.config, index.generator.metrics)
    source = f"bundle {bundle.digest}"
    arriving = [_arriving(task, source) for task in tasks]
    return Arrival(generator, index.generator.version, arriving, request.on_conflict, bundle.read)


def _arriving(task: BundledTask, source: str) -> ArrivingTask:
    original = NewAdapter(
        weights=task.weights,
        config=task.config,
        card=task.card,
        step=task.step,
        is_final=True,
        dtype=task.dtype,
        rank_max=task.rank_max,
        parameters=task.parameters,
        target_modules=task.target_modules,
        layout=[(shape.module, shape.rank, shape.inputs, shape.outputs) for shape in task.layout],
        source=source,
        is_generated=task.is_generated,
    )
    measured = None
    if task.measured is not None:
        measured = NewEvaluation(task=task.name, rung="code", generator_id=None, **asdict(task.measured))
    return ArrivingTask(task.name, original, task.weights_size, task.code, task.dw_error, measured)
