"""Growing a generator without encoding anything again, and going back to an earlier one.

    codes of the present generator ──linked──┐
    codes of new tasks ──────────────────────┴──▶ generator that continues it, current: one transaction

The bytes of a generator are not looked into here: that one continues another, so that it decodes its codes, is the word
of whoever makes it. Of an evicted task the code under the current generator is the one that was checked when its
original went; it counts, and no other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import delete, insert, literal, select, update
from sqlalchemy.orm import InstrumentedAttribute, Session

from registry import models, records, rows
from registry.base import StoreBase
from registry.code_rows import code_rows, current_row, spare_of
from registry.errors import GeneratorConflict, GeneratorNotFound, LastCopy
from registry.fs import failpoint
from registry.garbage import drop_unreferenced
from registry.learned import generator_row, must_cover_evicted
from registry.writer import RowWriter

_Copy = tuple[int, int | None]
"""The rows of the blobs of a code and of its residual."""


@dataclass(frozen=True)
class GeneratorUse:
    """A generator with what depends on it.

    Attributes:
        tasks: the tasks that have a code under it, by name.
        last_copies: the evicted ones of them that it alone gives back as they were checked.
    """

    generator: records.GeneratorRecord
    tasks: tuple[str, ...]
    last_copies: tuple[str, ...]


class GeneratorOperations(StoreBase):
    """What the store does with generators once they are there."""

    def add_codes(self, generator_id: int, codes: Sequence[records.NewCode]) -> list[records.CodeRecord]:
        """Record codes of tasks that have none under the current generator, in one transaction.

        A task that got one meanwhile keeps it; one that is gone, or has another adapter by now, gets none.

        Returns:
            What was recorded.

        Raises:
            GeneratorConflict: the generator is not the current one any more.
            MissingBlob: a digest is not in the store.
            In each case nothing is recorded.
        """
        with self._db.write() as session:
            writer = RowWriter(session, self._blobs, spare_of(codes))
            generator = current_row(session, generator_id)
            known = _copies(session, generator.id)
            new = list(code_rows(writer, generator, [code for code in codes if code.adapter.task not in known]))
            session.add_all(new)
            session.flush()
            recorded = [rows.code_record(row) for row in new]
            failpoint("rows-before-commit")
        failpoint("rows-committed")
        return recorded

    def extend_generator(self, new: records.NewGenerator) -> records.GeneratorRecord:
        """Make a generator current that decodes every code of its parent, in one transaction.

        All codes of the parent are its codes too, with what lies beside them and what was measured of them.

        Args:
            new: with the codes of further tasks; one of a task that the parent has a code of takes its place, one of a
                task that is gone, or has another adapter by now, is left out.

        Raises:
            GeneratorConflict: its parent is not the current generator any more.
            MissingBlob: a digest is not in the store.
            LastCopy: an evicted task would have another code, or none.
            In each case nothing is recorded.
        """
        with self._db.write() as session:
            writer = RowWriter(session, self._blobs, spare_of(new.codes))
            parent = current_row(session, new.parent_id)
            row = generator_row(writer, new)
            session.flush()
            fresh = list(code_rows(writer, row, new.codes))
            session.add_all(fresh)
            session.flush()
            row.start_id = parent.start_id  # its mean is a code as others are
            _link(session, parent.id, row.id, [code.task_id for code in fresh])
            _must_keep_copies(session, parent, row)
            must_cover_evicted(session, new.base_model, _copies(session, row.id))
            record = rows.generator_record(row)
            failpoint("rows-before-commit")
        failpoint("rows-committed")
        return record

    def generator_uses(self) -> list[GeneratorUse]:
        """Return every generator with what depends on it, by base model and version."""
        generator = models.Generator
        with self._db.read() as session:
            query = select(generator).join(generator.base_model).order_by(models.BaseModel.name, generator.version)
            return [
                GeneratorUse(
                    rows.generator_record(row), tuple(sorted(_copies(session, row.id))), _last_copies(session, row)
                )
                for row in session.scalars(query)
            ]

    def set_start(self, generator_id: int, blob: str, data: bytes | None = None) -> records.GeneratorRecord:
        """Record what adapters for unseen tasks start from, in the place of what there is.

        Args:
            generator_id: the current generator.
            blob: digest of the start's file.
            data: as for :class:`registry.records.NewCode`.

        Raises:
            GeneratorConflict: the generator is not the current one any more.
            MissingBlob: the digest is not in the store.
        """
        with self._db.write() as session:
            writer = RowWriter(session, self._blobs, {blob: data}.get)
            row = current_row(session, generator_id)
            old = None if row.start is None else row.start.digest
            row.start = writer.blob(blob)
            session.flush()
            record = rows.generator_record(row)
            failpoint("rows-before-commit")
        failpoint("rows-committed")
        drop_unreferenced(self._db, self._blobs, [old] if old not in (None, blob) else [])
        return record

    def make_current(self, generator_id: int) -> list[str]:
        """Make a generator the current one of its base model, whichever is now.

        Returns:
            The tasks that have a code now and none under that generator.

        Raises:
            GeneratorNotFound: there is none of that number.
            LastCopy: of an evicted task it has not the code that was checked when the original went.
        """
        generator = models.Generator
        with self._db.write() as session:
            row = _find(session, generator_id)
            of_base = generator.base_model_id == row.base_model_id
            present = session.scalar(select(generator).where(of_base, generator.is_current))
            codes, before = _copies(session, row.id), {}
            if present is not None:
                _must_keep_copies(session, present, row)
                before = _copies(session, present.id)
            must_cover_evicted(session, row.base_model.name, codes)
            session.execute(update(generator).where(of_base, generator.is_current).values(is_current=False))
            session.execute(update(generator).where(generator.id == generator_id).values(is_current=True))
            failpoint("rows-before-commit")
            return sorted(set(before) - set(codes))

    def check_forgettable(self, generator: records.GeneratorRecord) -> int:
        """Return how many codes :meth:`forget_generator` would forget, or raise what it would raise."""
        with self._db.read() as session:
            return len(_copies(session, _forgettable(session, generator).id))

    def forget_generator(self, generator: records.GeneratorRecord) -> int:
        """Forget a generator that is not current, with its codes and what was measured of them; prune frees the bytes.

        Args:
            generator: as it was when somebody decided that. The number of a row that went is given to the next one, so
                the rest is compared too.

        Returns:
            The number of codes that went.

        Raises:
            GeneratorNotFound: it is not there any more.
            GeneratorConflict: it is the current one.
            LastCopy: it holds the only code of an evicted task.
        """
        with self._lock.exclusive(), self._db.write() as session:
            row = _forgettable(session, generator)
            count = len(_copies(session, row.id))
            session.execute(delete(models.Generator).where(models.Generator.id == row.id))
            failpoint("rows-before-commit")
            return count


def _find(session: Session, generator_id: int) -> models.Generator:
    row = session.get(models.Generator, generator_id)
    if row is None:
        raise GeneratorNotFound(f"there is no generator of number {generator_id}", hint="`icm generators` lists them")
    return row


def _forgettable(session: Session, generator: records.GeneratorRecord) -> models.Generator:
    row = _find(session, generator.id)
    if _identity(rows.generator_record(row)) != _identity(generator):
        fact = f"generator {generator.blob[:12]} was forgotten meanwhile; another one has its number"
        raise GeneratorNotFound(fact, hint="`icm generators` lists them")
    if row.is_current:
        hint = "`icm generators rollback DIGEST` makes another one current first"
        raise GeneratorConflict(f"generator {row.blob.digest[:12]} is in use", hint=hint)
    last = _last_copies(session, row)
    if last:
        fact = f"generator {row.blob.digest[:12]} holds the only code of {_shown(last)}"
        hint = "`icm ingest --restore PATH` of their originals, or `icm rm` if nobody needs them"
        raise LastCopy(fact, hint=hint)
    return row


def _identity(generator: records.GeneratorRecord) -> tuple[str, str, int, str]:
    """Return what of a generator never changes and tells it from one that gets its number later."""
    return generator.blob, generator.base_model, generator.version, generator.created_at


def _copies(session: Session, generator_id: int, *, evicted: bool = False) -> dict[str, _Copy]:
    """Return task -> what a generator has of it, or only of those tasks whose original is gone."""
    code, adapter = models.Code, models.Adapter
    query = select(models.Task.name, code.blob_id, code.residual_id).join_from(code, models.Task)
    query = query.where(code.generator_id == generator_id)
    if evicted:
        query = query.join(adapter, adapter.id == code.adapter_id).where(adapter.evicted_at.is_not(None))
    return {name: (blob, residual) for name, blob, residual in session.execute(query)}


def _last_copies(session: Session, row: models.Generator) -> tuple[str, ...]:
    """Return the evicted tasks that only this generator can give back as they were checked."""
    generator, mine = models.Generator, _copies(session, row.id, evicted=True)
    others = select(generator.id).where(generator.base_model_id == row.base_model_id, generator.id != row.id)
    if row.is_current:
        found = [_copies(session, other, evicted=True) for other in session.scalars(others)]
        kept = {name for copies in found for name, copy in copies.items() if mine.get(name) == copy}
    else:  # whatever code the current one has is the one that was checked
        present = session.scalar(others.where(generator.is_current))
        kept = set() if present is None else set(_copies(session, present, evicted=True))
    return tuple(sorted(set(mine) - kept))


def _must_keep_copies(session: Session, present: models.Generator, new: models.Generator) -> None:
    """Raise unless a generator has the very codes, and residuals, that stand in for evicted tasks now."""
    needed, found = _copies(session, present.id, evicted=True), _copies(session, new.id)
    lost = sorted(name for name, copy in needed.items() if found.get(name) != copy)
    if lost:
        fact = f"generator {new.blob.digest[:12]} does not have the codes that stand in for {_shown(lost)}"
        hint = "`icm ingest --restore PATH` of their originals; until then the present generator has to stay"
        raise LastCopy(fact, hint=hint)


def _shown(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _link(session: Session, parent_id: int, generator_id: int, without: Sequence[int]) -> None:
    """Give a generator the codes of its parent and what was measured of them, without those of some tasks."""
    for table in (models.Code, models.Evaluation):
        columns: list[InstrumentedAttribute[object]] = [
            getattr(table, column.key) for column in table.__table__.columns if column.key not in ("id", "generator_id")
        ]
        chosen = select(literal(generator_id), *columns).where(
            table.generator_id == parent_id, table.task_id.not_in(without)
        )
        session.execute(insert(table).from_select(["generator_id", *(column.key for column in columns)], chosen))
