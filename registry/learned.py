"""Operations on what is learned from adapters: task vectors, generators, codes, evaluations."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from sqlalchemy import delete, func, select, update
from sqlalchemy.orm import Session

from registry import models, records, rows
from registry.base import StoreBase
from registry.code_rows import code_rows, spare_of
from registry.errors import LastCopy
from registry.fs import failpoint
from registry.garbage import drop_unreferenced
from registry.runs import finish_run
from registry.subjects import Subject, is_of_present, must_be_unchanged
from registry.writer import RowWriter, document_row, named_blob


class LearnedOperations(StoreBase):
    """What the store knows of vectors, generators, codes and evaluations."""

    def add_vectors(self, vectors: Sequence[records.NewVector], of: records.TaskSummary | None = None) -> int:
        """Record task vectors in one transaction and return how many were new or changed.

        A vector of the same task, view, support set and extractor takes the place of the earlier one.

        Args:
            vectors: what was made.
            of: the task that they were made of, as it was read then; without it they are taken as they come.

        Raises:
            TaskNotFound: a task is not in the store.
            CodeChanged: the task has another adapter, or other samples, by now.
            MissingBlob: a digest is not in the store.
            In each case nothing is recorded.
        """
        with self._db.write() as session:
            if of is not None:
                must_be_unchanged(session, of)
            writer = RowWriter(session, self._blobs)
            writer.load_blobs(vector.blob for vector in vectors)
            changed = sum([record_vector(writer, vector) for vector in vectors])
            session.flush()
            failpoint("rows-before-commit")
        failpoint("rows-committed")
        return changed

    def vectors(self, task: str | None = None) -> list[records.VectorRecord]:
        """Return all vectors, or those of one task, by task, extractor, view and support set.

        Raises:
            TaskNotFound: there is no such task.
        """
        vector = models.TaskVector
        with self._db.read() as session:
            query = select(vector).join(vector.task)
            query = query.order_by(models.Task.name, vector.extractor_id, vector.view, vector.support_set)
            if task is not None:
                query = query.where(vector.task_id == rows.find_task(session, task).id)
            return [rows.vector_record(row) for row in session.scalars(query)]

    def add_generator(self, generator: records.NewGenerator) -> records.GeneratorRecord:
        """Record a generator with all its codes in one transaction and make it the current one.

        A code whose task is gone, or has another adapter by now, is left out.

        Raises:
            MissingBlob: a digest is not in the store.
            LastCopy: an evicted task would have no code under it.
        """
        with self._db.write() as session:
            writer = RowWriter(session, self._blobs, spare_of(generator.codes))
            row = generator_row(writer, generator)
            codes = list(code_rows(writer, row, generator.codes))
            must_cover_evicted(session, generator.base_model, [code.task.name for code in codes])
            session.add_all(codes)
            garbage = finish_run(writer, generator.train_run_id) if generator.train_run_id else []
            session.flush()
            record = rows.generator_record(row)
            failpoint("rows-before-commit")
        failpoint("rows-committed")
        drop_unreferenced(self._db, self._blobs, garbage)
        return record

    def current_generator(self, base_model: str) -> records.GeneratorRecord | None:
        """Return the generator in use for a base model, or None before the first training."""
        generator = models.Generator
        with self._db.read() as session:
            query = select(generator).join(generator.base_model).where(models.BaseModel.name == base_model)
            row = session.scalar(query.where(generator.is_current))
            return None if row is None else rows.generator_record(row)

    def generators(self, base_model: str | None = None) -> list[records.GeneratorRecord]:
        """Return all generators, or those of one base model, oldest first."""
        generator = models.Generator
        query = select(generator).join(generator.base_model).order_by(models.BaseModel.name, generator.version)
        if base_model is not None:
            query = query.where(models.BaseModel.name == base_model)
        with self._db.read() as session:
            return [rows.generator_record(row) for row in session.scalars(query)]

    def code(self, task: str, generator_id: int) -> records.CodeRecord | None:
        """Return the code of a task under a generator, if it has one.

        Raises:
            TaskNotFound: there is no such task.
        """
        code = models.Code
        with self._db.read() as session:
            query = select(code).where(code.task_id == rows.find_task(session, task).id)
            row = session.scalar(query.where(code.generator_id == generator_id))
            return None if row is None else rows.code_record(row)

    def codes(self, generator_id: int) -> list[records.CodeRecord]:
        """Return all codes of a generator, by task name."""
        code = models.Code
        with self._db.read() as session:
            query = select(code).join(code.task).where(code.generator_id == generator_id).order_by(models.Task.name)
            return [rows.code_record(row) for row in session.scalars(query)]

    def add_evaluations(self, evaluations: Sequence[records.NewEvaluation], of: Subject | None = None) -> int:
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

    def evaluations(self, task: str | None = None) -> list[records.EvaluationRecord]:
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


def must_cover_evicted(session: Session, base_model: str, tasks: Iterable[str]) -> None:
    """Raise unless there are codes of all tasks of a base model that have no original any more."""
    adapter, base = models.Adapter, models.BaseModel
    query = select(models.Task.name).join(models.Task.base_model).join(adapter, adapter.task_id == models.Task.id)
    query = query.where(base.name == base_model, adapter.is_final, adapter.evicted_at.is_not(None))
    covered = {task.lower() for task in tasks}
    bare = [name for name in session.scalars(query.order_by(models.Task.name)) if name.lower() not in covered]
    if bare:
        fact = f"task {bare[0]!r} has no original any more, and would have no code"
        raise LastCopy(fact, hint="`icm ingest --restore PATH` of its original brings it back")


def record_vector(writer: RowWriter, new: records.NewVector) -> bool:
    """Record a task vector in an open transaction, and say whether it is new or changed."""
    vector = models.TaskVector
    task = rows.find_task(writer.session, new.task)
    extractor = document_row(writer.session, dict(new.extractor))
    blob = writer.blob(new.blob)
    writer.session.flush()
    row = writer.session.get(vector, (task.id, new.view, new.support_set, extractor.id))
    if row is not None and (row.blob_id, row.dim) == (blob.id, new.dim):
        return False
    if row is None:
        last = writer.session.scalar(select(func.max(vector.id))) or 0
        row = vector(id=last + 1, task=task, view=new.view, support_set=new.support_set, extractor=extractor)
        writer.session.add(row)
    row.blob, row.dim = blob, new.dim
    writer.session.flush()
    return True


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
