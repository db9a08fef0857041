"""Record one task with its adapters, so that the same ingest again changes nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from sqlalchemy import delete, select
from sqlalchemy.orm import Session, aliased

from registry import models, records
from registry.errors import TaskConflict
from registry.names import check_name
from registry.writer import MAX_VARIABLES, RowWriter

_Key = tuple[str, str, int | None]  # weights, config, step


def record_tasks(writer: RowWriter, ingests: Sequence[records.TaskIngest]) -> list[records.IngestOutcome]:
    """Write the rows of tasks into an open transaction; see :meth:`registry.tasks.TaskOperations.ingest_tasks`.

    What exists is fetched for all tasks at once, and the new rows are written at once when the caller flushes.
    """
    for ingest in ingests:
        check_name(ingest.name)
        if sum(adapter.is_final for adapter in ingest.adapters) != 1:
            raise ValueError(f"task {ingest.name!r} needs exactly one final adapter")
    if len({ingest.name.lower() for ingest in ingests}) != len(ingests):
        raise ValueError("two tasks of one batch have the same name")
    writer.load_blobs(digest for ingest in ingests for digest in _digests(ingest))
    known = {row.name.lower(): row for row in _existing(writer.session, [ingest.name for ingest in ingests])}
    return [_record_task(writer, known.get(ingest.name.lower()), ingest) for ingest in ingests]


def _existing(session: Session, names: Sequence[str]) -> Iterator[models.Task]:
    for at in range(0, len(names), MAX_VARIABLES):
        yield from session.scalars(select(models.Task).where(models.Task.name.in_(names[at : at + MAX_VARIABLES])))


def _digests(ingest: records.TaskIngest) -> Iterator[str]:
    of_adapters = (digest for new in ingest.adapters for digest in (new.weights, new.config, new.card))
    yield from filter(None, (ingest.samples, ingest.eval_data, *of_adapters))


def _record_task(writer: RowWriter, task: models.Task | None, ingest: records.TaskIngest) -> records.IngestOutcome:
    if task is None:
        return _add(writer, ingest, "added")
    if _same_adapter(writer.session, task, ingest):
        return _update(writer, task, ingest)
    if ingest.on_conflict == "fail":
        raise TaskConflict(task.name)
    if ingest.on_conflict == "skip":
        return records.IngestOutcome(task.name, 0, 0, "skipped")
    writer.session.delete(task)
    writer.session.flush()
    return _add(writer, ingest, "replaced")


def _same_adapter(session: Session, task: models.Task, ingest: records.TaskIngest) -> bool:
    weights, config = aliased(models.Blob), aliased(models.Blob)
    query = (
        select(weights.digest, config.digest)
        .select_from(models.Adapter)
        .join(weights, models.Adapter.weights_id == weights.id)
        .join(config, models.Adapter.config_id == config.id)
        .where(models.Adapter.task_id == task.id, models.Adapter.is_final)
    )
    offered = next(adapter for adapter in ingest.adapters if adapter.is_final)
    has = (task.base_model.name, *session.execute(query).one())
    return has == (ingest.base_model, offered.weights, offered.config)


def _add(writer: RowWriter, ingest: records.TaskIngest, status: records.IngestStatus) -> records.IngestOutcome:
    task = models.Task(
        name=ingest.name,
        base_model=writer.base_model(ingest.base_model),
        created_at=writer.now,
    )
    writer.session.add(task)
    _set_texts(writer, task, ingest)
    new = _add_adapters(writer, task, ingest, set())
    return records.IngestOutcome(ingest.name, new, len(ingest.adapters) - new, status)


def _update(writer: RowWriter, task: models.Task, ingest: records.TaskIngest) -> records.IngestOutcome:
    has_other_texts = _set_texts(writer, task, ingest)
    new = _add_adapters(writer, task, ingest, _known_adapters(writer.session, task))
    status: records.IngestStatus = "updated" if new or has_other_texts else "known"
    return records.IngestOutcome(task.name, new, len(ingest.adapters) - new, status)


def _set_texts(writer: RowWriter, task: models.Task, ingest: records.TaskIngest) -> bool:
    """Point the task at its samples and held-out texts and say whether that changed anything.

    Task vectors are made from the samples, so other samples make the present vectors wrong; they are dropped.
    """
    samples = writer.blob(ingest.samples) if ingest.samples else task.samples
    eval_data = writer.blob(ingest.eval_data) if ingest.eval_data else task.eval_data
    if samples is not task.samples and task.id is not None:  # a task without a number is new
        writer.session.execute(delete(models.TaskVector).where(models.TaskVector.task_id == task.id))
    changed = samples is not task.samples or eval_data is not task.eval_data
    task.samples, task.eval_data = samples, eval_data
    return changed


def _known_adapters(session: Session, task: models.Task) -> set[_Key]:
    query = select(models.Adapter).where(models.Adapter.task_id == task.id)
    return {(row.weights.digest, row.config.digest, row.step) for row in session.scalars(query)}


def _add_adapters(writer: RowWriter, task: models.Task, ingest: records.TaskIngest, known: set[_Key]) -> int:
    """Add the adapters that the task does not have and return their number."""
    has_final = bool(known)
    new = 0
    for adapter in ingest.adapters:
        key = (adapter.weights, adapter.config, adapter.step)
        # A known task's final adapter is known by its bytes alone: it may have come from a checkpoint's folder.
        if key in known or (has_final and adapter.is_final):
            continue
        writer.session.add(_adapter_row(writer, task, adapter))
        known.add(key)
        new += 1
    return new


def _adapter_row(writer: RowWriter, task: models.Task, adapter: records.NewAdapter) -> models.Adapter:
    return models.Adapter(
        task=task,
        step=adapter.step,
        is_final=adapter.is_final,
        weights=writer.blob(adapter.weights),
        config=writer.blob(adapter.config),
        card=writer.blob_or_none(adapter.card),
        dtype=adapter.dtype,
        rank_max=adapter.rank_max,
        parameters=adapter.parameters,
        target_modules=list(adapter.target_modules),
        layout=writer.document([list(entry) for entry in adapter.layout]),
        source=adapter.source,
        created_at=writer.now,
    )
