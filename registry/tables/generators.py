"""Growing a generator without encoding anything again, and going back to an earlier one.

    codes of the present generator ──linked──┐
    codes of new tasks ──────────────────────┴──▶ generator that continues it, current: one transaction

The bytes of a generator are not looked into here: that one continues another, so that it decodes its codes, is the word
of whoever makes it. Of an evicted task the code under the current generator is the one that was checked when its
original went; it counts, and no other.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from sqlalchemy import delete, func, insert, literal, select, update
from sqlalchemy.orm import Session

from registry import records
from registry import schema as models
from registry.errors import GeneratorConflict, GeneratorNotFound, LastCopy
from registry.names import some
from registry.row_checks import COLUMN
from registry.storage.row_writer import RowWriter, check_rows, table_of
from registry.tables.codes import code_files, code_rows, current_row, restore_hint_of
from registry.tables.table import Table
from registry.to_records import code_record, generator_record


@dataclass(frozen=True)
class GeneratorUse:
    """A generator with what depends on it."""

    generator: records.GeneratorRecord
    tasks: tuple[str, ...]  # that have a code under it, by name
    last_copies: tuple[str, ...]  # evicted tasks that only it gives back as they were checked


class Generators(Table):
    """Generators with their codes."""

    def add(self, generator: records.NewGenerator) -> records.GeneratorRecord:
        """Record a generator with all its codes in one transaction and make it the current one."""
        with self._write() as writer:
            relied_on = _evicted_under_current(writer.session, writer.base_model(generator.base_model).name)
            row = generator_row(writer, generator)
            codes = list(code_rows(writer, row, generator.codes))
            _must_cover(writer.session, relied_on, [*(code.task.name for code in codes), *generator.stay])
            writer.session.add_all(codes)
            garbage = _finished(writer, generator.train_run_id) if generator.train_run_id else []
            writer.session.flush()
            record = generator_record(row)
        self._drop(garbage)
        return record

    def current(self, base_model: str) -> records.GeneratorRecord | None:
        """Return the generator in use for a base model, or None before the first training."""
        with self._db.read() as session:
            row = find_current(session, base_model)
            return None if row is None else generator_record(row)

    def all(self, base_model: str | None = None) -> list[records.GeneratorRecord]:
        """Return all generators, or those of one base model, oldest first."""
        generator = models.Generator
        query = select(generator).join(generator.base_model).order_by(models.BaseModel.name, generator.version)
        if base_model is not None:
            query = query.where(models.BaseModel.name == base_model)
        with self._db.read() as session:
            return [generator_record(row) for row in session.scalars(query)]

    def extend(self, new: records.NewGenerator) -> records.GeneratorRecord:
        """Make a generator current that decodes every code of its parent, and record codes of further tasks.

        All codes of the parent become its codes too, with residuals and measurements, unless a new one replaces them.
        """
        with self._write() as writer:
            session = writer.session
            parent = current_row(session, new.parent_id)
            row = generator_row(writer, new)
            session.flush()
            fresh = list(code_rows(writer, row, new.codes))
            session.add_all(fresh)
            session.flush()
            row.start_id = parent.start_id  # its mean is a code as others are
            _link(session, parent.id, row.id, [code.task_id for code in fresh])
            _must_keep_codes(session, parent, row)
            garbage = _finished(writer, new.train_run_id) if new.train_run_id else []
            session.flush()
            record = generator_record(row)
        self._drop(garbage)
        return record

    def uses(self) -> list[GeneratorUse]:
        """Return every generator with what depends on it, by base model and version."""
        generator = models.Generator
        with self._db.read() as session:
            query = select(generator).join(generator.base_model).order_by(models.BaseModel.name, generator.version)
            return [
                GeneratorUse(
                    generator_record(row), tuple(sorted(code_files(session, row.id))), _last_copies(session, row)
                )
                for row in session.scalars(query)
            ]

    def set_start(self, generator_id: int, blob: str) -> records.GeneratorRecord:
        """Record the few-shot start of the current generator, in place of an earlier one."""
        with self._write() as writer:
            row = current_row(writer.session, generator_id)
            old = None if row.start is None else row.start.digest
            row.start = writer.blob(blob)
            writer.session.flush()
            record = generator_record(row)
        # Recording an equal start again must keep its file.
        self._drop({old} - {blob} if old else ())
        return record

    def make_current(self, generator_id: int) -> list[str]:
        """Make a generator the current one; return the tasks that lose their code by that."""
        generator = models.Generator
        with self._write() as writer:
            session = writer.session
            row = _find(session, generator_id)
            of_base = generator.base_model_id == row.base_model_id
            present = find_current(session, row.base_model.name)
            codes, before = code_files(session, row.id), {}
            if present is not None:
                _must_keep_codes(session, present, row)
                before = code_files(session, present.id)
            session.execute(update(generator).where(of_base, generator.is_current).values(is_current=False))
            session.execute(update(generator).where(generator.id == generator_id).values(is_current=True))
            return sorted(set(before) - set(codes))

    def check_forgettable(self, generator: records.GeneratorRecord) -> int:
        """Return how many codes :meth:`forget_generator` would forget, or raise what it would raise."""
        with self._db.read() as session:
            return len(code_files(session, _forgettable(session, generator).id))

    def forget(self, generator: records.GeneratorRecord) -> int:
        """Forget a generator that is not current, with its codes and measurements; return the number of codes."""
        with self._write() as writer:
            row = _forgettable(writer.session, generator)
            present = find_current(writer.session, row.base_model.name)
            if present is not None and code_files(writer.session, row.id, evicted=True):
                # Evicted tasks have the same codes under both: with damage there, only this one decodes them.
                self._blobs.check(present.blob.digest)
            query = select(models.Code).where(models.Code.generator_id == row.id)
            codes = [code_record(code) for code in writer.session.scalars(query)]
            garbage = [row.blob.digest, *([] if row.start is None else [row.start.digest])]
            garbage += [digest for code in codes for digest in code.digests()]
            writer.session.execute(delete(models.Generator).where(models.Generator.id == row.id))
        self._drop(garbage)
        return len(codes)


def _finished(writer: RowWriter, run_id: int) -> list[str]:
    from registry.tables.runs import finish_run  # most commands only read generators

    return finish_run(writer, run_id)


def find_current(session: Session, base_model: str) -> models.Generator | None:
    """Return the row of the generator in use for a base model."""
    generator = models.Generator
    query = select(generator).join(generator.base_model).where(models.BaseModel.name == base_model)
    return session.scalar(query.where(generator.is_current))


def _find(session: Session, generator_id: int) -> models.Generator:
    row = session.get(models.Generator, generator_id)
    if row is None:
        raise GeneratorNotFound(
            f"there is no generator number {generator_id}", hint="run `icm generators` to list them"
        )
    return row


def _forgettable(session: Session, generator: records.GeneratorRecord) -> models.Generator:
    row = _find(session, generator.id)
    if _identity(generator_record(row)) != _identity(generator):
        fact = f"generator {generator.blob[:12]} was removed by another process, and its number was reused"
        raise GeneratorNotFound(fact, hint="run `icm generators` to list them")
    if row.is_current:
        hint = "run `icm generators rollback DIGEST` first to switch to another one"
        raise GeneratorConflict(f"generator {row.blob.digest[:12]} is in use", hint=hint)
    last = _last_copies(session, row)
    if last:
        fact = f"generator {row.blob.digest[:12]} holds the only code of {some([repr(name) for name in last])}"
        hint = f"{restore_hint_of(session, last)}; if they are no longer needed, remove them with `icm rm`"
        raise LastCopy(fact, hint=hint)
    return row


def _identity(generator: records.GeneratorRecord) -> tuple[str, str, int, str]:
    """Return the values that never change and tell a generator from one that gets its number later."""
    return generator.blob, generator.base_model, generator.version, generator.created_at


def _last_copies(session: Session, row: models.Generator) -> tuple[str, ...]:
    """Return the evicted tasks that only this generator can give back as they were checked."""
    generator, mine = models.Generator, code_files(session, row.id, evicted=True)
    others = select(generator.id).where(generator.base_model_id == row.base_model_id, generator.id != row.id)
    if row.is_current:
        found = [code_files(session, other, evicted=True) for other in session.scalars(others)]
        # Equal files are one blob, so equal rows are the same code.
        kept = {name for codes in found for name, code in codes.items() if mine.get(name) == code}
    else:  # whatever code the current one has is the one that was checked
        present = session.scalar(others.where(generator.is_current))
        kept = set() if present is None else set(code_files(session, present, evicted=True))
    return tuple(sorted(set(mine) - kept))


def _must_keep_codes(session: Session, present: models.Generator, new: models.Generator) -> None:
    """Raise unless a generator has the very codes and residuals that evicted tasks rely on now."""
    needed, found = code_files(session, present.id, evicted=True), code_files(session, new.id)
    lost = sorted(name for name, copy in needed.items() if found.get(name) != copy)
    if lost:
        names = some([repr(name) for name in lost])
        fact = f"generator {new.blob.digest[:12]} lacks the codes that replaced the originals of {names}"
        hint = f"keep the current generator, or {restore_hint_of(session, lost)}"
        raise LastCopy(fact, hint=hint)


def _link(session: Session, parent_id: int, generator_id: int, without: Sequence[int]) -> None:
    """Give a generator the codes of its parent and what was measured of them, without those of some tasks."""
    # Copied inside SQLite: a fleet has thousands of codes.
    for table in map(table_of, (models.Code, models.Evaluation)):
        columns = [column for column in table.columns if column.key not in ("id", "generator_id", COLUMN)]
        copied = table.c.generator_id == parent_id, table.c.task_id.not_in(without)
        check_rows(session, table, *copied)
        chosen = select(literal(generator_id), *columns).where(*copied)
        session.execute(insert(table).from_select(["generator_id", *(column.key for column in columns)], chosen))


def _evicted_under_current(session: Session, base_model: str) -> set[str]:
    """Return the tasks of which there is only the code under the current generator of their base model.

    That of a task whose code has an older format may be under an earlier generator. Nothing changes for that one.
    """
    present = find_current(session, base_model)
    return set() if present is None else set(code_files(session, present.id, evicted=True))


def _must_cover(session: Session, relied_on: Collection[str], tasks: Iterable[str]) -> None:
    """Raise unless a generator that is to be current has a code of all tasks of which there is nothing else."""
    bare = sorted(set(relied_on) - set(tasks))
    if bare:
        fact = f"the new generator would leave evicted task {bare[0]!r} without a code"
        raise LastCopy(fact, hint=restore_hint_of(session, bare[:1]))


def generator_row(writer: RowWriter, new: records.NewGenerator, *, least_version: int = 1) -> models.Generator:
    """Make the row of a generator in an open transaction, in place of the current one; its codes are not written."""
    session, generator = writer.session, models.Generator
    base_model = writer.base_model(new.base_model)
    session.flush()
    of_base = generator.base_model_id == base_model.id
    session.execute(update(generator).where(of_base, generator.is_current).values(is_current=False))
    latest = session.scalar(select(func.max(generator.version)).where(of_base)) or 0
    row = generator(
        base_model=base_model,
        version=max(latest + 1, least_version),
        parent_id=new.parent_id,
        blob=writer.blob(new.blob),
        config=dict(new.config),
        metrics=dict(new.metrics),
        is_current=True,
        created_at=writer.now,
    )
    session.add(row)
    return row
