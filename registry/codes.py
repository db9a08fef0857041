"""Give a task another code under the generator that it has one of already, or something beside its code."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from registry import records, rows
from registry import schema as models
from registry.blobs.local import Spare
from registry.errors import CodeChanged, GeneratorConflict, LastCopy, TaskNotFound
from registry.evaluations import adapter_row, record_evaluation
from registry.files import failpoint
from registry.part import Part
from registry.prune import drop_unreferenced
from registry.rows import RowWriter

_Copy = tuple[int, int | None]
"""The rows of the blobs of a code and of its residual."""

_ASKED = tuple(field.name for field in fields(records.Asked))


class Codes(Part):
    """Replacing codes one at a time."""

    def get(self, task: str, generator_id: int) -> records.CodeRecord | None:
        """Return the code of a task under a generator, if it has one.

        Raises:
            TaskNotFound: there is no such task.
        """
        code = models.Code
        with self._db.read() as session:
            query = select(code).where(code.task_id == rows.find_task(session, task).id)
            row = session.scalar(query.where(code.generator_id == generator_id))
            return None if row is None else rows.code_record(row)

    def all(self, generator_id: int) -> list[records.CodeRecord]:
        """Return all codes of a generator, by task name."""
        code = models.Code
        with self._db.read() as session:
            query = select(code).join(code.task).where(code.generator_id == generator_id).order_by(models.Task.name)
            return [rows.code_record(row) for row in session.scalars(query)]

    def add(self, generator_id: int, codes: Sequence[records.NewCode]) -> list[records.CodeRecord]:
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
            known = copies(session, generator.id)
            new = list(code_rows(writer, generator, [code for code in codes if code.adapter.task not in known]))
            session.add_all(new)
            session.flush()
            recorded = [rows.code_record(row) for row in new]
            failpoint("rows-before-commit")
        failpoint("rows-committed")
        return recorded

    def replace(
        self, generator_id: int, new: records.NewCode, evaluations: Sequence[records.NewEvaluation] = ()
    ) -> records.CodeRecord:
        """Record a code in the place of the task's present one, with what was measured of it, in one transaction.

        What was measured of the present code goes with it, and so does its residual with what was measured of that.
        Their files are removed once no row refers to them.

        Raises:
            TaskNotFound: there is no such task.
            GeneratorConflict: the generator is not the current one any more.
            CodeChanged: the task has another adapter by now.
            MissingBlob: the new code's digest is not in the store.
            LastCopy: the task's original is gone, so the present code is the only copy.
        """
        code = models.Code
        with self._db.write() as session:
            writer = RowWriter(session, self._blobs, spare_of([new]))
            generator, adapter = current_row(session, generator_id), adapter_row(session, new.adapter)
            _must_have_original(adapter)
            of_task = code.task_id == adapter.task_id, code.generator_id == generator.id
            row = session.scalar(select(code).where(*of_task))
            old = [] if row is None else _digests(row)
            if row is None:
                row = code(task=adapter.task, generator_id=generator.id)
                session.add(row)
            row.adapter_id, row.blob = adapter.id, writer.blob(new.blob)
            row.bits, row.dw_error = new.bits, new.dw_error
            row.residual, row.residual_error = None, None
            _note(writer, row, ("code", "residual"), new.asked, evaluations)
            record = rows.code_record(row)
            failpoint("rows-before-commit")
        failpoint("rows-committed")
        drop_unreferenced(self._db, self._blobs, [digest for digest in old if digest != new.blob])
        return record

    def replace_residual(
        self,
        present: records.CodeRecord,
        new: records.NewResidual | None,
        asked: records.Asked,
        evaluations: Sequence[records.NewEvaluation] = (),
    ) -> records.CodeRecord:
        """Record what lies beside a code from now on, with what was measured of it, in one transaction.

        Args:
            present: the code, which stays as it is.
            new: the residual; None for none.
            asked: what the two were to keep.
            evaluations: what was measured.

        Raises:
            MissingBlob: the residual's digest is not in the store.
            CodeChanged: the task has another code by now.
            LastCopy: the task's original is gone, so what is there is the only copy.
        """
        with self._db.write() as session:
            writer = RowWriter(session, self._blobs, spare_of(() if new is None else [new]))
            row = session.get(models.Code, present.id)
            if row is None or row.blob.digest != present.blob:
                fact = f"task {present.task!r} got another code meanwhile"
                raise CodeChanged(fact, hint="run the same command again")
            _must_have_original(session.get_one(models.Adapter, row.adapter_id))
            old = [] if row.residual is None else [row.residual.digest]
            row.residual = None if new is None else writer.blob(new.blob)
            row.residual_error = None if new is None else new.dw_error
            _note(writer, row, ("residual",), asked, evaluations)
            record = rows.code_record(row)
            failpoint("rows-before-commit")
        failpoint("rows-committed")
        drop_unreferenced(self._db, self._blobs, [digest for digest in old if new is None or digest != new.blob])
        return record


def _must_have_original(adapter: models.Adapter) -> None:
    if adapter.evicted_at is not None:
        fact = f"the original of task {adapter.task.name!r} is gone; its code stays"
        raise LastCopy(fact, hint="`icm ingest --restore PATH` of its original brings it back")


def _digests(row: models.Code) -> list[str]:
    return [row.blob.digest, *([] if row.residual is None else [row.residual.digest])]


def _note(
    writer: RowWriter,
    row: models.Code,
    rungs: Sequence[records.Rung],
    asked: records.Asked | None,
    evaluations: Sequence[records.NewEvaluation],
) -> None:
    """Write what is known of a code in an open transaction; what was measured of its earlier rungs is forgotten."""
    session, evaluation = writer.session, models.Evaluation
    for column, value in asked_columns(asked).items():
        setattr(row, column, value)
    session.flush()
    measured = (evaluation.task_id == row.task_id, evaluation.rung.in_(rungs))
    session.execute(delete(evaluation).where(*measured, evaluation.generator_id == row.generator_id))
    for one in evaluations:
        record_evaluation(session, one, writer.now)
    session.flush()


def current_row(session: Session, generator_id: int | None) -> models.Generator:
    """Return the row of a generator.

    Raises:
        GeneratorConflict: it is not the current one of its base model (any more).
    """
    row = None if generator_id is None else session.get(models.Generator, generator_id)
    if row is None or not row.is_current:
        fact = "another icm made another generator current meanwhile"
        raise GeneratorConflict(fact, hint="run the same command again")
    return row


def code_rows(
    writer: RowWriter, generator: models.Generator, codes: Sequence[records.NewCode]
) -> Iterator[models.Code]:
    """Make the rows of codes whose adapter is still that of its task, and none of the others.

    Args:
        writer: Of the open transaction.
        generator: Under which they were made; its row is flushed by then.
        codes: What was made.
    """
    writer.session.flush()
    for new in codes:
        try:
            adapter = adapter_row(writer.session, new.adapter)
        except (TaskNotFound, CodeChanged):
            continue
        yield models.Code(
            task=adapter.task,
            generator_id=generator.id,
            adapter_id=adapter.id,
            blob=writer.blob(new.blob),
            bits=new.bits,
            dw_error=new.dw_error,
            **asked_columns(new.asked),
        )


def spare_of(new: Iterable[records.NewCode | records.NewResidual]) -> Spare:
    """Return what gives the bytes of what is to be recorded, as far as they are held."""
    return {one.blob: one.data for one in new if one.data is not None}.get


def asked_columns(asked: records.Asked | None) -> dict[str, float | None]:
    """Return column -> value of what a code was asked to keep."""
    columns = {field: None if asked is None else getattr(asked, field) for field in _ASKED}
    return {**columns, "refined": columns["refined"] or None}


def copies(session: Session, generator_id: int, *, evicted: bool = False) -> dict[str, _Copy]:
    """Return task -> what a generator has of it, or only of those tasks whose original is gone."""
    code, adapter = models.Code, models.Adapter
    query = select(models.Task.name, code.blob_id, code.residual_id).join_from(code, models.Task)
    query = query.where(code.generator_id == generator_id)
    if evicted:
        query = query.join(adapter, adapter.id == code.adapter_id).where(adapter.evicted_at.is_not(None))
    return {name: (blob, residual) for name, blob, residual in session.execute(query)}
