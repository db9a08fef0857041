"""Task vectors."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from sqlalchemy import func, select

from registry import records
from registry import schema as models
from registry.storage.row_writer import RowWriter, document_row, final_if_unchanged, find_task
from registry.tables import summary_rows
from registry.tables.table import Table
from registry.to_records import record, task_record


class Vectors(Table):
    """Task vectors."""

    def add(self, vectors: Sequence[records.NewVector], of: records.TaskSummary | None = None) -> int | None:
        """Record task vectors in one transaction and return how many were new or changed.

        With `of`, the task that they were made of, nothing is recorded and None returned if that has changed since.
        """
        with self._write() as writer:
            if of is not None:
                final = final_if_unchanged(writer.session, of.final)
                if final is None or task_record(final.task).samples != of.task.samples:
                    return None
            writer.load_blobs(vector.blob for vector in vectors)
            return sum([record_vector(writer, vector) for vector in vectors])

    def all(self, task: str | None = None) -> list[records.VectorRecord]:
        """Return all vectors, or those of one task, by task, extractor, view and support set."""
        number = None
        if task is not None:
            with self._db.read() as session:
                number = find_task(session, task).id
        with self._db.columns() as columns:
            return list(summary_rows.vectors(columns, number))

    def of(self, tasks: Sequence[str]) -> dict[str, list[records.VectorRecord]]:
        """Return task -> its vectors, for those that have some."""
        return self._by_task(models.TaskVector, partial(record, records.VectorRecord), tasks)


def record_vector(writer: RowWriter, new: records.NewVector) -> bool:
    """Record a task vector in an open transaction, and say whether it is new or changed."""
    vector = models.TaskVector
    task = find_task(writer.session, new.task)
    extractor = document_row(writer.session, dict(new.extractor))
    blob = writer.blob(new.blob)
    writer.session.flush()
    row = writer.session.get(vector, (task.id, new.view, new.support_set, extractor.id))
    if row is not None and (row.blob_id, row.dim) == (blob.id, new.dim):
        return False
    if row is None:
        # The table has no rowids, so nobody else numbers its rows.
        last = writer.session.scalar(select(func.max(vector.id))) or 0
        row = vector(id=last + 1, task=task, view=new.view, support_set=new.support_set, extractor=extractor)
        writer.session.add(row)
    row.blob, row.dim = blob, new.dim
    writer.session.flush()
    return True
