"""Write the generator of one base model and the codes of some tasks into one file, for use without the store."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from icmlora.adapter.layout import ModuleShape
from icmlora.bundle.file import bundle_digest, bundle_size, write_bundle
from icmlora.bundle.index import (
    MAX_CARD_BYTES,
    BundledExtra,
    BundledGenerator,
    BundledMeasurement,
    BundledTask,
    BundledVectors,
    BundleIndex,
    BundlePart,
)
from icmlora.errors import CodeError, DataError
from icmlora.fleet.context import Context, base_name, check_base_model, use_case
from icmlora.fleet.resources.stored_vectors import latest_vectors, vectors_by_task
from icmlora.generator.code import generator_of
from icmlora.generator.file import versions_of
from icmlora.io.staging import check_absent
from registry.errors import DamagedStore
from registry.records import Claim, latest_evaluation

if TYPE_CHECKING:
    from registry.records import EvaluationRecord, GeneratorRecord, TaskSummary, VectorRecord
    from registry.store import Store


@dataclass(frozen=True)
class ExportReport:
    """What was written."""

    file: Path
    digest: str  # SHA-256 that identifies the whole file
    size: int
    index: BundleIndex
    left_out: tuple[str, ...]
    damaged: Mapping[str, str] = field(default_factory=dict)  # tasks that are not in it because of damage, and why


@use_case
def export_bundle(
    context: Context, file: str | Path, tasks: Sequence[str] = (), *, base_model: str | None = None, force: bool = False
) -> ExportReport:
    """Write the generator and the codes of some tasks into one file; `icmlora.Bundle` reads it without a store.

    A bundle has no originals and no texts. The same store gives the same bytes.

    Args:
        context: The store.
        file: The bundle to write.
        tasks: Names of tasks; by default all that have a code.
        base_model: Only tasks of this base model. Needed if the tasks have several.
        force: Replace a file that exists.

    Raises:
        DataError: A named task has no code, or the tasks have several base models.
        OutputExists: The file exists and `force` is not given.
    """
    path = Path(file)
    check_absent(path, force=force)
    with context.open(read_only=True) as store:
        generator, rows, left_out = _choose(store, tasks, base_model)
        entries, damaged = _readable(store, rows, generator)
        if damaged and (tasks or not entries):
            name, reason = next(iter(damaged.items()))
            hint = "run `icm verify --repair` to move damaged files aside, or export only the other tasks"
            raise CodeError(f"task {name!r} cannot be exported: {reason}", hint=hint)
        parts = dict.fromkeys([generator.blob, *(digest for task in entries for digest in task.parts)])
        index = BundleIndex(
            base_model=generator.base_model,
            generator=BundledGenerator(
                generator.blob, generator.version, dict(generator.config), dict(generator.metrics)
            ),
            tasks=tuple(sorted(entries, key=lambda task: task.name.lower())),
            parts=tuple(BundlePart(digest, store.blobs.size(digest)) for digest in parts),
        )
        # From here on the export keeps to the codes in the index, whatever other processes encode.
        codes = {task.code: task.name for task in index.tasks}
        made_by = {version.digest for version in versions_of(store.blobs.read(generator.blob))}
        written = write_bundle(path, index, lambda digest: _read_part(store, digest, codes, made_by), force=force)
        for done, part in enumerate(written, 1):
            context.progress(done, len(index.parts), codes.get(part.digest, ""))
    return ExportReport(path, bundle_digest(index), bundle_size(index), index, left_out, damaged)


def _choose(
    store: Store, tasks: Sequence[str], base_model: str | None
) -> tuple[GeneratorRecord, Sequence[TaskSummary], tuple[str, ...]]:
    """Find the tasks to export and the one generator of all their codes; also name the tasks without a code."""
    named = {store.tasks.get(name).name for name in tasks}
    rows = [row for row in store.tasks.summaries() if not named or row.task.name in named]
    base_model = base_name(store, base_model)
    check_base_model(base_model, {row.task.base_model for row in rows}, named=bool(named))
    rows = [row for row in rows if base_model in (None, row.task.base_model)]
    coded = [row for row in rows if row.code is not None]
    without = tuple(row.task.name for row in rows if row.code is None)
    if named and without:
        hint = "run `icm train --update` to encode them, or export only the other tasks"
        raise DataError(f"no code under the current generator: {', '.join(without)}", hint=hint)
    bases = sorted({row.task.base_model for row in coded})
    if len(bases) > 1:
        fact = f"a bundle has one base model, but these tasks have {len(bases)}: {', '.join(bases)}"
        raise DataError(fact, hint="choose one with --base-model NAME, or name tasks of a single base model")
    generator = store.generators.current(bases[0]) if bases else None
    if generator is None:
        raise DataError("no task has a code to export", hint="run `icm train` to make codes")
    if any(row.code is None or row.code.generator_id != generator.id for row in coded):
        raise DataError("another process replaced the generator", hint="run the same command again")
    return generator, coded, without


def _readable(
    store: Store, rows: Sequence[TaskSummary], generator: GeneratorRecord
) -> tuple[list[BundledTask], dict[str, str]]:
    """Return the entries of the tasks whose parts can be read, and what is damaged of the others."""
    vectors, entries, damaged = vectors_by_task(store), list[BundledTask](), dict[str, str]()
    for row in rows:
        try:
            entry = _task(store, row, generator, vectors[row.task.name])
            for digest in entry.parts:
                store.blobs.read(digest)
            entries.append(entry)
        except DamagedStore as error:
            damaged[row.task.name] = error.message
    return entries, damaged


def _task(store: Store, row: TaskSummary, generator: GeneratorRecord, vectors: Sequence[VectorRecord]) -> BundledTask:
    final, code = row.final, row.code
    assert code is not None  # `_choose` takes tasks with a code only
    claim = code.claim or Claim(None)  # a bundle passes on what nobody here has measured: its figures are claims anyway
    squared_error = claim.squared_error if code.squared_error is None else code.squared_error
    measured = _measured(latest_evaluation(store.evaluations.all(row.task.name), row.task, "code", generator))
    if measured is None and claim.measured is not None:
        measured = BundledMeasurement(**claim.measured)  # type: ignore[arg-type]
    card = final.card if final.card is not None and store.blobs.size(final.card) <= MAX_CARD_BYTES else None
    return BundledTask(
        name=row.task.name,
        code=code.blob,
        squared_error=_float(squared_error),
        weights=final.weights,
        weights_size=final.weights_bytes,
        config=final.config,
        card=card,
        dtype=final.dtype,
        step=final.step,
        is_generated=final.is_generated,
        layout=tuple(ModuleShape(*entry) for entry in final.layout),
        template=final.template,
        format=final.format,
        extras=tuple(BundledExtra(extra.blob, extra.file, extra.size) for extra in final.extras),
        measured=measured,
        vectors=_vectors(vectors),
    )


def _vectors(rows: Sequence[VectorRecord]) -> BundledVectors | None:
    """Return the file with the latest vectors of a task, the one of the context view if there are several."""
    latest = sorted(latest_vectors(rows), key=lambda row: (row.view == "context", row.id))
    if not latest:
        return None
    part = latest[-1].blob
    made_by = {row.view: dict(row.extractor) for row in latest if row.blob == part}
    return BundledVectors(part, tuple(made_by[view] for view in sorted(made_by)))


def _measured(row: EvaluationRecord | None) -> BundledMeasurement | None:
    if row is None:
        return None
    return BundledMeasurement(
        data=row.data,
        value=float(row.value),
        count=row.count,
        utf8_bytes=row.utf8_bytes,
        retained_gain=_float(row.retained_gain),
        squared_error=_float(row.squared_error),
        settings=dict(row.settings),
        metric=row.metric,
        others=dict(row.others),
    )


def _float(value: float | None) -> float | None:
    """Return a number as a float: SQLite gives 0.0 back as 0, and the two differ in JSON."""
    return None if value is None else float(value)


def _read_part(store: Store, digest: str, codes: Mapping[str, str], made_by: Collection[str]) -> bytes:
    """Read a part; a code must belong to the generator that is exported with it."""
    data = store.blobs.read(digest)
    if digest in codes and generator_of(data) not in made_by:
        fact = f"the code of {codes[digest]!r} belongs to another generator"
        raise CodeError(fact, hint="run `icm train` to encode it again")
    return data
