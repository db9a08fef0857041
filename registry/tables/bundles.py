"""Import bundles: codes that were made elsewhere become tasks whose original was evicted.

    blobs are durable ──▶ what is known ──▶ decide, task by task ──▶ generator, tasks, codes: one transaction

The same import again changes nothing. The generator must be the one in use for its base model, or the first one: a code
can be decoded with its own generator only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Literal

from sqlalchemy import select
from sqlalchemy.orm import Session

from registry import records
from registry import schema as models
from registry.errors import GeneratorConflict, TaskConflict
from registry.names import check_name
from registry.records import description_of
from registry.storage.row_writer import RowWriter, document_row, in_parts
from registry.tables.base_models import names_of
from registry.tables.generators import find_current, generator_row
from registry.tables.ingest import KnownTask, known_tasks
from registry.tables.table import Table
from registry.tables.vectors import record_vector
from registry.to_records import task_folder, unusual_source

ImportStatus = Literal["added", "encoded", "known", "skipped"]


@dataclass(frozen=True)
class ImportedTask:
    """A task whose code comes without its original."""

    name: str
    original: records.NewAdapter  # its weights are elsewhere, its other blobs in the store
    weights_bytes: int
    code: str  # digest of the code's file
    squared_error: float | None  # that was measured here; None for a code from elsewhere
    claim: records.Claim | None = None  # what is said of a code from elsewhere
    vectors: Sequence[records.NewVector] = ()  # recorded for a new task only

    def digests(self) -> Iterator[str]:
        """Yield the digests that the task refers to, the one of the absent weights too."""
        yield from filter(None, (self.code, self.original.weights, self.original.config, self.original.card))
        yield from (extra.blob for extra in self.original.extras)
        yield from (vector.blob for vector in self.vectors)


@dataclass(frozen=True)
class BundleImport:
    """A generator with codes, to be recorded in one transaction."""

    generator: records.NewGenerator  # without codes
    version: int  # its number where it comes from; a higher one here if that is taken
    tasks: Sequence[ImportedTask]
    on_conflict: Literal["skip", "fail"] = "fail"  # if the store has such a task with another adapter, or code


@dataclass(frozen=True)
class ImportOutcome:
    """What became of an `ImportedTask`."""

    name: str  # as the store spells it
    status: ImportStatus


@dataclass(frozen=True)
class _Decision:
    """What is done about one task; `known` is the task as it is in the store."""

    task: ImportedTask
    status: ImportStatus
    known: KnownTask | None

    def outcome(self) -> ImportOutcome:
        return ImportOutcome(self.task.name if self.known is None else self.known.name, self.status)


class Bundles(Table):
    """Codes that were made elsewhere."""

    def plan(self, bundle: BundleImport) -> list[ImportOutcome]:
        """Say what :meth:`add` would do; no blob need be in the store yet. Raises as that does."""
        with self._db.read() as session:
            return [item.outcome() for item in _decide(session, bundle)]

    def add(self, bundle: BundleImport) -> list[ImportOutcome]:
        """Record a generator with its codes, and the tasks that are not in the store, in one transaction."""
        with self._write() as writer:
            decisions = [self._without_bytes(item, bundle) for item in _decide(writer.session, bundle)]
            todo = [item for item in decisions if item.status in ("added", "encoded")]
            if todo:
                _write(writer, bundle, todo)
        return [item.outcome() for item in decisions]

    def _without_bytes(self, item: _Decision, bundle: BundleImport) -> _Decision:
        """Skip a task that the plan skipped, so that its code was not stored, and that has changed since then."""
        if bundle.on_conflict == "fail" or item.status != "encoded" or self._blobs.exists(item.task.code):
            return item
        return replace(item, status="skipped")


def _decide(session: Session, bundle: BundleImport) -> list[_Decision]:
    names = [check_name(task.name) for task in bundle.tasks]
    bundle = replace(bundle, generator=replace(bundle.generator, base_model=_base_name(session, bundle)))
    if len({name.lower() for name in names}) != len(names):
        raise ValueError("two tasks in the bundle have the same name")
    generator = _generator_in_use(session, bundle)
    known = known_tasks(session.connection(), names)
    codes = {} if generator is None else _codes(session, generator, list(known.values()))
    return [_decide_task(known.get(task.name.lower()), codes, task, bundle) for task in bundle.tasks]


def _decide_task(known: KnownTask | None, codes: dict[int, str], task: ImportedTask, bundle: BundleImport) -> _Decision:
    if known is None:
        return _Decision(task, "added", None)
    original = task.original.weights, task.original.config
    code = codes.get(known.id)
    if (known.base_model, known.final) == (bundle.generator.base_model, original) and code in (None, task.code):
        return _Decision(task, "encoded" if code is None else "known", known)
    if bundle.on_conflict == "fail":
        raise TaskConflict(known.name, choices="skip")
    return _Decision(task, "skipped", known)


def _generator_in_use(session: Session, bundle: BundleImport) -> models.Generator | None:
    """Return the row of the bundle's generator, or None if its base model has none yet."""
    new = bundle.generator
    row = find_current(session, _base_name(session, bundle))
    if row is not None and row.blob.digest != new.blob:
        fact = (
            f"the store uses generator {row.version} ({row.blob.digest[:12]}) of {new.base_model}, not {new.blob[:12]}"
        )
        hint = "import into another store (--store), or use the bundle directly with `icm materialize --from`"
        raise GeneratorConflict(fact, hint=hint)
    return row


def _base_name(session: Session, bundle: BundleImport) -> str:
    """Return what this store calls the bundle's base model."""
    label = bundle.generator.base_model
    return names_of(session.connection(), [label])[label]


def _codes(session: Session, generator: models.Generator, tasks: Sequence[KnownTask]) -> dict[int, str]:
    """Return the number of each task that has a code under the generator, with the code's digest."""
    code, found = models.Code, dict[int, str]()
    for some in in_parts([task.id for task in tasks]):
        query = select(code.task_id, models.Blob.digest, code.crc, models.Blob.crc).join(code.blob)
        rows = session.execute(query.where(code.generator_id == generator.id, code.task_id.in_(some)))
        found.update((number, digest) for number, digest, *_ in rows)
    return found


def _write(writer: RowWriter, bundle: BundleImport, todo: Sequence[_Decision]) -> None:
    session = writer.session
    writer.load_blobs(digest for item in todo for digest in item.task.digests())
    generator = _generator_in_use(session, bundle)
    if generator is None:
        generator = generator_row(writer, bundle.generator, least_version=bundle.version)
    session.flush()
    for item in todo:
        adapter = _new_adapter(writer, bundle, item.task) if item.known is None else _final(session, item.known)
        session.flush()
        session.add(_code(writer, item.task, adapter, generator))
        # A task that is here already has vectors of its own samples.
        for vector in item.task.vectors if item.known is None else ():
            record_vector(writer, vector)
    session.flush()


def _code(writer: RowWriter, task: ImportedTask, adapter: models.Adapter, generator: models.Generator) -> models.Code:
    blob = writer.blob(task.code)
    return models.Code(
        task_id=adapter.task_id,
        adapter_id=adapter.id,
        generator_id=generator.id,
        blob=blob,
        bits=8.0 * blob.size,
        squared_error=task.squared_error,
        claim=None if task.claim is None else asdict(task.claim),
    )


def _new_adapter(writer: RowWriter, bundle: BundleImport, new: ImportedTask) -> models.Adapter:
    """Make the rows of a task and of its original, whose weights no file of this store holds."""
    base_model, original = writer.base_model(bundle.generator.base_model), new.original
    folder = task_folder(original.source)
    adapter = models.Adapter(
        task=models.Task(name=new.name, base_model=base_model, created_at=writer.now, folder=folder),
        step=original.step,
        is_final=True,
        # Known by digest only, so that the original is recognised when it comes.
        weights=writer.absent_blob(original.weights, new.weights_bytes),
        config=writer.blob(original.config),
        card=None if original.card is None else writer.blob(original.card),
        description=document_row(writer.session, description_of(original)),
        source=unusual_source(original.source, folder, original.step, is_final=True),
        created_at=writer.now,
        evicted_at=writer.now,
        is_generated=original.is_generated,
    )
    writer.session.add(adapter)
    for extra in original.extras:
        adapter.extras.append(models.Extra(file=extra.file or "", blob=writer.blob(extra.blob), size=extra.size))
    return adapter


def _final(session: Session, task: KnownTask) -> models.Adapter:
    adapter = models.Adapter
    return session.scalars(select(adapter).where(adapter.task_id == task.id, adapter.is_final)).one()
