"""Write the generator of one base model with the codes of chosen tasks into one file, to be used without the store."""

from __future__ import annotations

from collections.abc import Collection, Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from icm_cli.workflows.chosen import check_base_model
from icm_cli.workflows.events import Event, Step
from icm_cli.workflows.measured import latest_of
from icm_cli.workflows.opening import Place
from icm_cli.workflows.rereading import as_it_is_now
from icmlora.bundle import bundle_digest, bundle_size, write_bundle
from icmlora.bundle_index import MAX_CARD_BYTES, BundledGenerator, BundledTask, BundleIndex, Measured, Part
from icmlora.errors import CodeError, DataError
from icmlora.layout import ModuleShape
from icmlora.output_file import check_absent
from registry.errors import CodeChanged, MissingBlob
from registry.records import EvaluationRecord, GeneratorRecord, TaskSummary

if TYPE_CHECKING:
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


def export(place: Place, request: ExportRequest) -> Generator[Event, None, Exported]:
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
    with place.open(read_only=True) as store:
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
        yield Step(done, len(index.parts), codes.get(part.digest, ""))
    bare = tuple(row.task.name for row in choice.rows if row.code is not None and row.code.residual is not None)
    return Exported(request.file, bundle_digest(index), bundle_size(index), index, choice.left_out, bare)


def _choose(store: Store, request: ExportRequest) -> _Choice:
    """Find the tasks that are meant and the one generator that all their codes belong to."""
    named = {store.task(name).name for name in request.names}
    rows = [row for row in store.summaries() if not named or row.task.name in named]
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
    generator = store.current_generator(bases[0]) if bases else None
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
        parts=tuple(Part(digest, store.blob_size(digest)) for digest in digests),
    )


def _task(store: Store, row: TaskSummary, generator: GeneratorRecord) -> BundledTask:
    final, code = row.final, row.code
    if code is None:
        raise ValueError(f"{row.task.name} has no code")
    card = final.card if final.card is not None and store.blob_size(final.card) <= MAX_CARD_BYTES else None
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
        measured=_measured(latest_of(store.evaluations(row.task.name), row.task, "code", generator)),
    )


def _measured(row: EvaluationRecord | None) -> Measured | None:
    if row is None:
        return None
    return Measured(
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
    from icmlora.generator.epochs import epochs_of

    return frozenset(epoch.digest for epoch in epochs_of(store.read_blob(generator.blob)))


def _read(store: Store, digest: str, known: Collection[str], codes: Mapping[str, str]) -> bytes:
    """Read a part; a code must be one of the generator that goes with it."""
    from icmlora.generator.code import generator_of

    data = store.read_blob(digest)
    if digest in codes and generator_of(data) not in known:
        fact = f"the code of {codes[digest]!r} belongs to another generator"
        raise CodeError(fact, hint="`icm train` makes it again")
    return data
