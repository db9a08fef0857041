"""Measurements of what a task keeps."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from registry import records, rows
from registry import schema as models
from registry.errors import CodeChanged, TaskNotFound
from registry.files import failpoint
from registry.part import Part
from registry.rows import RowWriter, code_record, document_row, find_final, find_task, named_blob


@dataclass(frozen=True)
class Subject:
    """What is measured of a task, as it was read.

    Attributes:
        final: its final adapter.
        generator: the generator of the rungs `residual`, `code` and `generate`; it need not be current any more.
        code: the task's code under it, with its residual.
    """

    final: records.AdapterRecord
    generator: records.GeneratorRecord | None
    code: records.CodeRecord | None


class Evaluations(Part):
    """Measurements, one for each task, source, generator and text."""

    def add(self, evaluations: Sequence[records.NewEvaluation], of: Subject | None = None) -> int:
        """Record measurements in one transaction; each takes the place of an earlier one of the same thing.

        Args:
            evaluations: what was measured.
            of: what it was measured on, as it was read then. What is not of what the task has by now is left out.

        Returns:
            How many were recorded.

        Raises:
            TaskNotFound: a task is not in the store.
        """
        with self._db.write() as session:
            now = RowWriter(session, self._blobs).now
            present = [one for one in evaluations if of is None or is_of_present(session, one, of)]
            for evaluation in present:
                record_evaluation(session, evaluation, now)
            session.flush()
            failpoint("rows-before-commit")
        return len(present)

    def all(self, task: str | None = None) -> list[records.EvaluationRecord]:
        """Return all measurements, or those of one task, by task, data and rung.

        Raises:
            TaskNotFound: there is no such task.
        """
        evaluation = models.Evaluation
        with self._db.read() as session:
            query = select(evaluation).join(evaluation.task).join(evaluation.data)
            query = query.order_by(models.Task.name, models.Blob.digest, evaluation.rung, evaluation.id)
            if task is not None:
                query = query.where(evaluation.task_id == rows.find_task(session, task).id)
            return [rows.evaluation_record(row) for row in session.scalars(query)]


def record_evaluation(session: Session, new: records.NewEvaluation, now: str) -> None:
    """Record a measurement in an open transaction, in place of an earlier one of the same thing."""
    evaluation = models.Evaluation
    task, data = rows.find_task(session, new.task), named_blob(session, new.data)
    same = (
        evaluation.task_id == task.id,
        evaluation.rung == new.rung,
        evaluation.generator_id.is_not_distinct_from(new.generator_id),
        evaluation.data_id == data.id,
        evaluation.metric == new.metric,
    )
    session.execute(delete(evaluation).where(*same))
    session.add(
        evaluation(
            task=task,
            rung=new.rung,
            generator_id=new.generator_id,
            data=data,
            metric=new.metric,
            nats_per_token=new.nats_per_token,
            tokens=new.tokens,
            utf8_bytes=new.utf8_bytes,
            retained_gain=new.retained_gain,
            dw_error=new.dw_error,
            settings=document_row(session, dict(new.settings)),
            created_at=now,
        )
    )
    session.flush()


def is_of_present(session: Session, new: records.NewEvaluation, of: Subject) -> bool:
    """Say whether what was measured is what the task has now; of the base model that is always so."""
    if new.rung == "base":
        return True
    try:
        task = adapter_row(session, of.final).task
    except (TaskNotFound, CodeChanged):
        return False
    if new.rung == "original":
        return True
    generator = None if of.generator is None else session.get(models.Generator, of.generator.id)
    if of.generator is None or generator is None or generator.blob.digest != of.generator.blob:
        return False
    return new.rung == "generate" or _is_present_code(session, task, generator, of.code)


def _is_present_code(
    session: Session, task: models.Task, generator: models.Generator, seen: records.CodeRecord | None
) -> bool:
    code = models.Code
    row = session.scalar(select(code).where(code.task_id == task.id, code.generator_id == generator.id))
    return row is not None and seen is not None and _files(code_record(row)) == _files(seen)


def _files(code: records.CodeRecord) -> tuple[str, str | None]:
    return code.blob, None if code.residual is None else code.residual.blob


def adapter_row(session: Session, encoded: records.AdapterRecord) -> models.Adapter:
    """Return the row of an adapter that was encoded.

    Raises:
        TaskNotFound: there is no such task (any more).
        CodeChanged: it is not the final adapter of its task any more.
    """
    task = find_task(session, encoded.task)
    final = find_final(session, task.id)
    wanted = encoded.id, encoded.weights, encoded.config
    if final is None or (final.id, final.weights.digest, final.config.digest) != wanted:
        raise CodeChanged(f"task {task.name!r} got another adapter meanwhile", hint="run the same command again")
    return final


def latest(
    evaluations: Iterable[records.EvaluationRecord],
    task: records.TaskRecord,
    rung: records.Rung,
    generator: records.GeneratorRecord,
) -> records.EvaluationRecord | None:
    """Return the measurement of a generator's rung on the task's own held-out text, else the latest on any text."""
    rows = [row for row in evaluations if row.rung == rung and row.generator_id == generator.id]
    return max(rows, key=lambda row: (row.data == task.eval_data, row.id), default=None)
