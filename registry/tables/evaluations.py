"""Measurements of how well the sources of a task do on held-out text."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from registry import records
from registry import schema as models
from registry.names import NLL
from registry.storage.row_writer import document_row, final_if_unchanged, find_task, named_blob
from registry.tables.table import Table
from registry.to_records import code_record, evaluation_record


class Evaluations(Table):
    """Measurements, one for each task, source, generator, text, metric and few bits of the base model."""

    def add(
        self,
        evaluations: Sequence[records.NewEvaluation],
        of: records.AdapterRecord | None = None,
        code: records.CodeRecord | None = None,
    ) -> int:
        """Record measurements in one transaction; each replaces an earlier one of the same thing.

        Those of `of`, the adapter, or `code` that the task no longer has are left out. Return how many were recorded.
        """
        with self._write() as writer:
            present = [one for one in evaluations if of is None or _is_current(writer.session, one, of, code)]
            for evaluation in present:
                record_evaluation(writer.session, evaluation, writer.now)
            return len(present)

    def all(self, task: str | None = None) -> list[records.EvaluationRecord]:
        """Return all measurements, or those of one task, by task, text and source."""
        evaluation = models.Evaluation
        with self._db.read() as session:
            query = select(evaluation).join(evaluation.task).join(evaluation.data)
            name = models.in_any_case(models.Task.name)
            query = query.order_by(name, models.Blob.digest, evaluation.rung, evaluation.id)
            if task is not None:
                query = query.where(evaluation.task_id == find_task(session, task).id)
            return [evaluation_record(row) for row in session.scalars(query)]

    def of(self, tasks: Sequence[str]) -> dict[str, list[records.EvaluationRecord]]:
        """Return task -> its measurements, for those that have some."""
        return self._by_task(models.Evaluation, evaluation_record, tasks)


def record_evaluation(session: Session, new: records.NewEvaluation, now: str) -> None:
    """Record a measurement in an open transaction, in place of an earlier one of the same thing."""
    evaluation = models.Evaluation
    task, data = find_task(session, new.task), named_blob(session, new.data)
    same = (
        evaluation.task_id == task.id,
        evaluation.rung == new.rung,
        evaluation.generator_id.is_not_distinct_from(new.generator_id),
        evaluation.data_id == data.id,
        evaluation.kind == _kind(new.metric),
        evaluation.load_in.is_not_distinct_from(new.load_in),
    )
    session.execute(delete(evaluation).where(*same))
    session.add(
        evaluation(
            task=task,
            rung=new.rung,
            generator_id=new.generator_id,
            data=data,
            kind=_kind(new.metric),
            value=new.value,
            count=new.count,
            utf8_bytes=new.utf8_bytes,
            retained_gain=new.retained_gain,
            squared_error=new.squared_error,
            settings=document_row(session, dict(new.settings)),
            created_at=now,
            score=None if new.metric == NLL else {"metric": new.metric, "others": dict(new.others)},
            load_in=new.load_in,
        )
    )
    session.flush()


def _kind(metric: str) -> str:
    return "nll" if metric == NLL else "other"


def _is_current(
    session: Session, new: records.NewEvaluation, of: records.AdapterRecord, code: records.CodeRecord | None
) -> bool:
    """Say whether what was measured is what the task has now; of the base model that is always so."""
    if new.rung == "base":
        return True
    final = final_if_unchanged(session, of)
    if final is None or new.rung == "original":
        return final is not None
    if new.rung in ("generate", "network"):
        return session.get(models.Generator, new.generator_id) is not None
    of_task = models.Code.task_id == final.task_id, models.Code.generator_id == new.generator_id
    row = session.scalar(select(models.Code).where(*of_task))
    return row is not None and code is not None and code_record(row).digests() == code.digests()
