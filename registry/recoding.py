"""Give a task another code under the generator that it has one of already."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import delete, select

from registry import models, records, rows
from registry.base import StoreBase
from registry.errors import LastCopy
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

        What was measured of the present code goes with it. Its file is removed once no row refers to it.

        Raises:
            TaskNotFound: there is no such task.
            MissingBlob: the new code's digest is not in the store.
            LastCopy: the task's original is gone, so the present code is the only copy.
        """
        code, evaluation = models.Code, models.Evaluation
        with self._db.write() as session:
            writer = RowWriter(session, self._blobs)
            task = rows.find_task(session, new.task)
            adapter = session.get_one(models.Adapter, new.adapter_id)
            if adapter.evicted_at is not None:
                raise LastCopy(
                    f"the original of task {task.name!r} is gone; its code stays",
                    hint="`icm ingest --restore PATH` of its original brings it back",
                )
            row = session.scalar(select(code).where(code.task_id == task.id, code.generator_id == generator_id))
            old = [] if row is None else [row.blob.digest]
            if row is None:
                row = code(task=task, generator_id=generator_id)
                session.add(row)
            row.adapter_id, row.blob = new.adapter_id, writer.blob(new.blob)
            row.bits, row.dw_error = new.bits, new.dw_error
            measured = (evaluation.task_id == task.id, evaluation.rung == "code")
            session.execute(delete(evaluation).where(*measured, evaluation.generator_id == generator_id))
            for one in evaluations:
                record_evaluation(session, one, writer.now)
            session.flush()
            record = rows.code_record(row)
            failpoint("rows-before-commit")
        failpoint("rows-committed")
        drop_unreferenced(self._db, self._blobs, [digest for digest in old if digest != new.blob])
        return record
