"""From table rows to records."""

from __future__ import annotations

import difflib
from typing import Any, cast

from sqlalchemy import select
from sqlalchemy.orm import Session

from registry import models, records
from registry.descriptions import Description
from registry.errors import TaskNotFound
from registry.folders import usual_source


def find_task(session: Session, name: str) -> models.Task:
    """Return a task by name, in any case.

    Raises:
        TaskNotFound: there is none; the error holds the closest names.
    """
    task = session.scalar(select(models.Task).where(models.Task.name == name))
    if task is None:
        names = {found.lower(): found for found in session.scalars(select(models.Task.name))}
        close = difflib.get_close_matches(name.lower(), names, n=3)
        raise TaskNotFound(name, tuple(names[match] for match in close))
    return task


def find_final(session: Session, task_id: int) -> models.Adapter | None:
    """Return the final adapter of a task; only a damaged store has a task without one."""
    adapter = models.Adapter
    return session.scalar(select(adapter).where(adapter.task_id == task_id, adapter.is_final))


def task_record(row: models.Task) -> records.TaskRecord:
    """Return the record of a task."""
    return records.TaskRecord(
        id=row.id,
        name=row.name,
        base_model=row.base_model.name,
        samples=_digest(row.samples),
        eval_data=_digest(row.eval_data),
        created_at=row.created_at,
        pinned=row.pinned,
    )


def adapter_record(row: models.Adapter) -> records.AdapterRecord:
    """Return the record of an adapter."""
    description = Description(*row.description.body)
    return records.AdapterRecord(
        id=row.id,
        task=row.task.name,
        step=row.step,
        is_final=row.is_final,
        weights=row.weights.digest,
        config=row.config.digest,
        card=_digest(row.card),
        dtype=description.dtype,
        rank_max=description.rank_max,
        parameters=description.parameters,
        target_modules=tuple(description.target_modules),
        layout=tuple((name, rank, inputs, outputs) for name, rank, inputs, outputs in description.layout),
        source=_source(row),
        original_bytes=row.weights.size + row.config.size + (row.card.size if row.card else 0),
        weights_bytes=row.weights.size,
        created_at=row.created_at,
        evicted_at=row.evicted_at,
        is_generated=row.is_generated,
    )


def vector_record(row: models.TaskVector) -> records.VectorRecord:
    """Return the record of a task vector."""
    return records.VectorRecord(
        id=row.id,
        task=row.task.name,
        view=cast(records.View, row.view),
        support_set=row.support_set,
        extractor=row.extractor.body,
        blob=row.blob.digest,
        dim=row.dim,
    )


def code_record(row: models.Code) -> records.CodeRecord:
    """Return the record of a code."""
    return records.CodeRecord(
        id=row.id,
        task=row.task.name,
        adapter_id=row.adapter_id,
        generator_id=row.generator_id,
        blob=row.blob.digest,
        size=row.blob.size,
        bits=row.bits,
        dw_error=row.dw_error,
        asked=_asked(row),
        residual=_residual(row),
    )


def generator_record(row: models.Generator) -> records.GeneratorRecord:
    """Return the record of a generator."""
    return records.GeneratorRecord(
        id=row.id,
        base_model=row.base_model.name,
        version=row.version,
        parent_id=row.parent_id,
        blob=row.blob.digest,
        size=row.blob.size,
        config=row.config,
        metrics=row.metrics,
        is_current=row.is_current,
        created_at=row.created_at,
        start=None if row.start is None else row.start.digest,
        start_size=0 if row.start is None else row.start.size,
    )


def train_run_record(row: models.TrainRun) -> records.TrainRunRecord:
    """Return the record of a training run."""
    return records.TrainRunRecord(
        id=row.id,
        base_model=row.base_model.name,
        state=cast(Any, row.state),
        config=row.config,
        step=row.step,
        weights=_digest(row.weights),
        optimizer=_digest(row.optimizer),
        created_at=row.created_at,
        updated_at=row.updated_at,
    )


def evaluation_record(row: models.Evaluation) -> records.EvaluationRecord:
    """Return the record of a measurement."""
    return records.EvaluationRecord(
        id=row.id,
        task=row.task.name,
        rung=cast(records.Rung, row.rung),
        generator_id=row.generator_id,
        data=row.data.digest,
        metric=row.metric,
        nats_per_token=row.nats_per_token,
        tokens=row.tokens,
        utf8_bytes=row.utf8_bytes,
        retained_gain=row.retained_gain,
        dw_error=row.dw_error,
        settings=row.settings.body,
        created_at=row.created_at,
    )


def _residual(row: models.Code) -> records.ResidualRecord | None:
    if row.residual is None or row.residual_error is None:
        return None
    return records.ResidualRecord(row.residual.digest, row.residual_error, row.residual.size)


def _asked(row: models.Code) -> records.Asked | None:
    if row.is_kept is None:
        return None
    return records.Asked(row.min_gain, row.max_error, row.tolerance, row.is_kept, row.refined or 0)


def _source(row: models.Adapter) -> str:
    return usual_source(row.task.folder, row.step, is_final=row.is_final) if row.source is None else row.source


def _digest(blob: models.Blob | None) -> str | None:
    return None if blob is None else blob.digest
