"""What the store knows of tasks, as an ingest needs it: digests and numbers, in few statements and without the ORM."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from sqlalchemy import Connection, exists, select

from registry import models
from registry.evicted import EvictedAdapter
from registry.row_numbers import in_parts, table_of

AdapterKey = tuple[str, str, int | None]
"""What tells adapters of a task apart: weights, configuration, step."""

_TASKS, _ADAPTERS, _VECTORS = map(table_of, (models.Task, models.Adapter, models.TaskVector))
_BLOBS, _BASES = map(table_of, (models.Blob, models.BaseModel))


@dataclass(frozen=True)
class KnownTask:
    """A task that is in the store.

    Attributes:
        final: weights and configuration of its final adapter; None only where the store is damaged.
        pinned: whether its originals are never evicted.
        folder: where its adapters came from.
        adapters: all its adapters.
        evicted: those whose weights were deleted, with their row's number, without the final one.
        evicted_final: the number of the final adapter, if its weights were deleted.
    """

    id: int
    name: str
    base_model: str
    samples: str | None
    eval_data: str | None
    pinned: bool
    folder: str
    final: tuple[str, str] | None = None
    adapters: frozenset[AdapterKey] = frozenset()
    evicted: Mapping[AdapterKey, int] = field(default_factory=dict)
    evicted_final: int | None = None


def known_tasks(connection: Connection, names: Sequence[str]) -> dict[str, KnownTask]:
    """Return the tasks of these names, in any case, by name in lower case."""
    tasks: dict[int, KnownTask] = {}
    for some in in_parts(names):
        tasks |= {task.id: task for task in _tasks(connection, some)}
    for ids in in_parts(list(tasks)):
        _add_adapters(connection, ids, tasks)
    return {task.name.lower(): task for task in tasks.values()}


def names_without_vectors(connection: Connection) -> list[str]:
    """Return the names of the tasks that have no task vector, in order."""
    query = select(_TASKS.c.name).where(~exists().where(_VECTORS.c.task_id == _TASKS.c.id)).order_by(_TASKS.c.name)
    return list(connection.execute(query).scalars())


def evicted_adapters(connection: Connection) -> list[EvictedAdapter]:
    """Return all adapters whose weights were deleted, by task."""
    weights, config = _BLOBS.alias(), _BLOBS.alias()
    query = (
        select(_TASKS.c.name, weights.c.digest, config.c.digest, _ADAPTERS.c.step, _ADAPTERS.c.is_final)
        .join_from(_ADAPTERS, _TASKS)
        .join(weights, _ADAPTERS.c.weights_id == weights.c.id)
        .join(config, _ADAPTERS.c.config_id == config.c.id)
        .where(_ADAPTERS.c.evicted_at.is_not(None))
        .order_by(_TASKS.c.name, _ADAPTERS.c.id)
    )
    return [EvictedAdapter(*row) for row in connection.execute(query)]


def _tasks(connection: Connection, names: Sequence[str]) -> list[KnownTask]:
    samples, eval_data = _BLOBS.alias(), _BLOBS.alias()
    query = (
        select(
            *(_TASKS.c.id, _TASKS.c.name, _BASES.c.name, samples.c.digest, eval_data.c.digest),
            *(_TASKS.c.pinned, _TASKS.c.folder),
        )
        .join_from(_TASKS, _BASES)
        .outerjoin(samples, _TASKS.c.samples_id == samples.c.id)
        .outerjoin(eval_data, _TASKS.c.eval_id == eval_data.c.id)
        .where(_TASKS.c.name.in_(names))
    )
    return [KnownTask(*row) for row in connection.execute(query)]


def _add_adapters(connection: Connection, ids: Sequence[int], tasks: dict[int, KnownTask]) -> None:
    weights, config = _BLOBS.alias(), _BLOBS.alias()
    query = (
        select(
            *(_ADAPTERS.c.task_id, weights.c.digest, config.c.digest, _ADAPTERS.c.step),
            *(_ADAPTERS.c.is_final, _ADAPTERS.c.evicted_at, _ADAPTERS.c.id),
        )
        .join_from(_ADAPTERS, weights, _ADAPTERS.c.weights_id == weights.c.id)
        .join(config, _ADAPTERS.c.config_id == config.c.id)
        .where(_ADAPTERS.c.task_id.in_(ids))
    )
    for task_id, weights_digest, config_digest, step, is_final, evicted_at, number in connection.execute(query):
        task = tasks[task_id]
        key = (weights_digest, config_digest, step)
        task = replace(task, adapters=task.adapters | {key})
        if is_final:
            task = replace(task, final=key[:2], evicted_final=None if evicted_at is None else number)
        elif evicted_at is not None:
            task = replace(task, evicted={**task.evicted, key: number})
        tasks[task_id] = task
