"""Give a task another code under the generator that it has one of already, or something beside its code."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import delete, select

from registry import models, records, rows
from registry.base import StoreBase
from registry.code_rows import asked_columns, current_row, encoded_row, spare_of
from registry.errors import CodeChanged, LastCopy
from registry.fs import failpoint
from registry.garbage import drop_unreferenced
from registry.learned import record_evaluation
from registry.writer import RowWriter


class RecodingOperations(StoreBase):
    """Replacing codes one at a time."""

    def replace_code(
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
            generator, adapter = current_row(session, generator_id), encoded_row(session, new.adapter)
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
