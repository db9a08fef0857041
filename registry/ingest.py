"""Record tasks with their adapters, so that the same ingest again changes nothing.

what is known ──▶ decide, task by task ──▶ numbers of blobs, layouts, base models ──▶ all new rows at once
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

from sqlalchemy import Connection, delete, insert, update

from registry import models, records
from registry.base import StoreBase
from registry.blobs import BlobStore
from registry.descriptions import Description, description_of
from registry.errors import TaskConflict
from registry.folders import task_folder, unusual_source
from registry.known_tasks import AdapterKey, KnownTask, known_tasks
from registry.names import check_name
from registry.row_numbers import RowNumbers, in_parts, table_of
from registry.writer import utc_now

_TASKS, _ADAPTERS, _VECTORS = map(table_of, (models.Task, models.Adapter, models.TaskVector))


@dataclass(frozen=True)
class _Decision:
    """What is done about one task.

    Attributes:
        known: the task as it is in the store; None where it is not, or will be replaced.
        new: its adapters that the store lacks.
        new_samples: whether it gets other samples than it has.
        new_eval_data: whether it gets other held-out texts than it has.
        evicted: its offered adapters whose weights were deleted, with their rows' numbers.
        pinned: whether its originals are never evicted.
        replaced: the number of the task whose place it takes; None where there is none.
    """

    ingest: records.TaskIngest
    status: records.IngestStatus
    known: KnownTask | None
    new: tuple[records.NewAdapter, ...]
    new_samples: bool
    new_eval_data: bool
    evicted: Mapping[AdapterKey, int] = field(default_factory=dict)
    pinned: bool = False
    replaced: int | None = None

    def outcome(self) -> records.IngestOutcome:
        """Return what the caller is told."""
        name = self.ingest.name if self.known is None else self.known.name
        seen = 0 if self.status == "skipped" else len(self.ingest.adapters) - len(self.new)
        left, back = (0, len(self.evicted)) if self.ingest.restore else (len(self.evicted), 0)
        return records.IngestOutcome(name, len(self.new), seen, self.status, left, back)

    def folder(self) -> str:
        """Return where the task's adapters come from."""
        final = next(adapter for adapter in self.ingest.adapters if adapter.is_final)
        return task_folder(final.source) if self.known is None else self.known.folder

    def digests(self) -> Iterator[str]:
        """Yield the digests whose files must be there: all but the weights of what stays evicted."""
        yield from filter(None, (self.ingest.samples, self.ingest.eval_data))
        for adapter in self.ingest.adapters:
            yield from filter(None, (adapter.config, adapter.card))
            if self.ingest.restore or _key(adapter) not in self.evicted:
                yield adapter.weights


class IngestPlanOperations(StoreBase):
    """What the store says of an ingest before it is made."""

    def plan_ingest(self, tasks: Sequence[records.TaskIngest]) -> list[records.IngestOutcome]:
        """Say what :meth:`registry.tasks.TaskOperations.ingest_tasks` would do, and write nothing.

        No blob need be in the store yet, so `MissingBlob` is never raised; everything else is, as by that.
        """
        with self._db.connection() as connection:
            return [item.outcome() for item in _decide_all(connection, tasks)]


def plan_first_ingest(tasks: Sequence[records.TaskIngest]) -> list[records.IngestOutcome]:
    """Say what an ingest into a store that is still to be made would do; raises as `plan_ingest` does."""
    return [item.outcome() for item in _decide_all(None, tasks)]


def record_tasks(
    connection: Connection, files: BlobStore, ingests: Sequence[records.TaskIngest]
) -> list[records.IngestOutcome]:
    """Write the rows of tasks into an open transaction; see :meth:`registry.tasks.TaskOperations.ingest_tasks`."""
    decisions = _decide_all(connection, ingests)
    for item in decisions:
        if item.replaced is not None:
            connection.execute(delete(_TASKS).where(_TASKS.c.id == item.replaced))
    _write(connection, files, [item for item in decisions if item.status != "skipped"])
    return [item.outcome() for item in decisions]


def _decide_all(connection: Connection | None, ingests: Sequence[records.TaskIngest]) -> list[_Decision]:
    """Decide what is done about each task; without a connection there is no store yet, and every task is new."""
    for ingest in ingests:
        check_name(ingest.name)
        if sum(adapter.is_final for adapter in ingest.adapters) != 1:
            raise ValueError(f"task {ingest.name!r} needs exactly one final adapter")
    names = [ingest.name for ingest in ingests]
    if len({name.lower() for name in names}) != len(names):
        raise ValueError("two tasks of one batch have the same name")
    known = {} if connection is None else known_tasks(connection, names)
    return [_decide(known.get(ingest.name.lower()), ingest) for ingest in ingests]


def _decide(known: KnownTask | None, ingest: records.TaskIngest) -> _Decision:
    if known is None:
        return _added(ingest)
    final = next(adapter for adapter in ingest.adapters if adapter.is_final)
    if (known.base_model, known.final) == (ingest.base_model, (final.weights, final.config)):
        return _updated(known, ingest)
    if ingest.on_conflict == "fail":
        raise TaskConflict(known.name)
    if ingest.on_conflict == "skip":
        return _Decision(ingest, "skipped", known, (), new_samples=False, new_eval_data=False)
    return replace(_added(ingest), status="replaced", pinned=known.pinned, replaced=known.id)


def _added(ingest: records.TaskIngest) -> _Decision:
    new = _unknown(ingest.adapters, set())
    return _Decision(ingest, "added", None, new, new_samples=True, new_eval_data=True)


def _updated(known: KnownTask, ingest: records.TaskIngest) -> _Decision:
    # A known task's final adapter is known by its bytes alone: it may have come from a checkpoint's folder.
    new = _unknown((adapter for adapter in ingest.adapters if not adapter.is_final), set(known.adapters))
    new_samples = ingest.samples not in (None, known.samples)
    new_eval_data = ingest.eval_data not in (None, known.eval_data)
    evicted = dict(_evicted(known, ingest.adapters))
    is_restored = bool(evicted) and ingest.restore
    status: records.IngestStatus = "updated" if new or new_samples or new_eval_data or is_restored else "known"
    return _Decision(ingest, status, known, new, new_samples, new_eval_data, evicted)


def _evicted(known: KnownTask, adapters: Iterable[records.NewAdapter]) -> Iterator[tuple[AdapterKey, int]]:
    for adapter in adapters:
        number = known.evicted_final if adapter.is_final else known.evicted.get(_key(adapter))
        if number is not None:
            yield _key(adapter), number


def _unknown(adapters: Iterable[records.NewAdapter], seen: set[AdapterKey]) -> tuple[records.NewAdapter, ...]:
    """Return the adapters that are not among those seen, each once."""
    new: list[records.NewAdapter] = []
    for adapter in adapters:
        if _key(adapter) not in seen:
            seen.add(_key(adapter))
            new.append(adapter)
    return tuple(new)


def _key(adapter: records.NewAdapter) -> AdapterKey:
    return adapter.weights, adapter.config, adapter.step


def _write(connection: Connection, files: BlobStore, decisions: Sequence[_Decision]) -> None:
    numbers = RowNumbers(connection, files)
    blobs = numbers.blobs(digest for item in decisions for digest in item.digests())
    descriptions = numbers.documents(description_of(new) for item in decisions for new in item.new)
    bases = numbers.base_models(item.ingest.base_model for item in decisions)
    now = utc_now()
    rows: list[dict[str, Any]] = []
    for item in decisions:
        task, folder = _task_number(connection, item, blobs, bases, now), item.folder()
        rows.extend(
            {"task_id": task, "created_at": now, **_adapter_values(new, folder, blobs, descriptions)}
            for new in item.new
        )
    if rows:
        connection.execute(insert(_ADAPTERS), rows)
    back = [number for item in decisions if item.ingest.restore for number in item.evicted.values()]
    for some in in_parts(back):
        connection.execute(update(_ADAPTERS).where(_ADAPTERS.c.id.in_(some)).values(evicted_at=None))


def _task_number(
    connection: Connection, item: _Decision, blobs: Mapping[str, int], bases: Mapping[str, int], now: str
) -> int:
    """Bring the row of a task up to date and return its number."""
    texts: dict[str, int | None] = {}
    if item.new_samples:
        texts["samples_id"] = _number(blobs, item.ingest.samples)
    if item.new_eval_data:
        texts["eval_id"] = _number(blobs, item.ingest.eval_data)
    if item.known is None:
        base = bases[item.ingest.base_model]
        values = {"name": item.ingest.name, "base_model_id": base, "created_at": now, "pinned": item.pinned}
        values |= {"folder": item.folder(), **texts}
        return cast(int, connection.execute(insert(_TASKS).returning(_TASKS.c.id), values).scalar_one())
    if item.new_samples:  # vectors are made from the samples: other samples make the present ones wrong
        connection.execute(delete(_VECTORS).where(_VECTORS.c.task_id == item.known.id))
    if texts:
        connection.execute(update(_TASKS).where(_TASKS.c.id == item.known.id).values(texts))
    return item.known.id


def _adapter_values(
    new: records.NewAdapter, folder: str, blobs: Mapping[str, int], descriptions: Mapping[Description, int]
) -> dict[str, Any]:
    return {
        "step": new.step,
        "is_final": new.is_final,
        "weights_id": blobs[new.weights],
        "config_id": blobs[new.config],
        "card_id": _number(blobs, new.card),
        "description_id": descriptions[description_of(new)],
        "source": unusual_source(new.source, folder, new.step, is_final=new.is_final),
    }


def _number(blobs: Mapping[str, int], digest: str | None) -> int | None:
    return None if digest is None else blobs[digest]
