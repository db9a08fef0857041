"""Record tasks with their adapters, so that the same ingest again changes nothing.

what is known ──▶ decide, task by task ──▶ numbers of blobs, layouts, base models ──▶ all new rows at once

An ingest may have thousands of adapters, so this works with digests and numbers in few statements, without the ORM.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

from sqlalchemy import Connection, delete, func, insert, select, update

from registry import records
from registry import schema as models
from registry.errors import TaskConflict
from registry.names import UNKNOWN_BASE, check_name, is_bundle_source
from registry.records import Description, description_of
from registry.storage.blobs.content import Blobs
from registry.storage.row_writer import RowNumbers, in_parts, insert_into, same_names, table_of, utc_now
from registry.tables.base_models import find_labels, names_of
from registry.tables.origins import CONFIGS, WEIGHTS, adapter_rows, checks_of
from registry.to_records import task_folder, unusual_source

AdapterKey = tuple[str, str, int | None]
"""What tells adapters of a task apart: weights, configuration, step."""

_TASKS, _ADAPTERS, _VECTORS = map(table_of, (models.Task, models.Adapter, models.TaskVector))
_BLOBS, _BASES, _EXTRAS = map(table_of, (models.Blob, models.BaseModel, models.Extra))
_PLACE = func.coalesce(_ADAPTERS.c.source, _TASKS.c.folder)
"""Where an adapter came from, but for the folder of a checkpoint."""


@dataclass(frozen=True)
class KnownTask:
    """A task that is in the store."""

    id: int
    name: str
    base_model: str
    samples: str | None
    eval_data: str | None
    pinned: bool
    folder: str
    note: str | None = None
    tags: tuple[str, ...] = ()
    final: tuple[str, str] | None = None  # weights and configuration; None only where the store is damaged
    final_row: int = 0  # of that adapter
    files: frozenset[str] = frozenset()  # names of those next to the final adapter
    adapters: frozenset[AdapterKey] = frozenset()
    evicted: Mapping[AdapterKey, int] = field(default_factory=dict)  # adapter -> row, without the final adapter
    evicted_final: int | None = None  # row of the final adapter, if its weights were deleted
    never_here: frozenset[int] = frozenset()  # rows of those evicted ones that a bundle brought, without their weights
    # (weights, configuration) -> rows of those that are there and whose initial weights are not known
    without_initial: Mapping[tuple[str, str], tuple[int, ...]] = field(default_factory=dict)


def known_tasks(connection: Connection, names: Sequence[str]) -> dict[str, KnownTask]:
    """Return the tasks of these names, in any case, by name in lower case."""
    tasks: dict[int, KnownTask] = {}
    for some in in_parts(same_names(connection, names)):
        tasks |= {task.id: task for task in _tasks(connection, some)}
    for ids in in_parts(list(tasks)):
        _add_adapters(connection, ids, tasks)
        _add_files(connection, ids, tasks)
    return {task.name.lower(): task for task in tasks.values()}


def _tasks(connection: Connection, names: Sequence[str]) -> list[KnownTask]:
    samples, eval_data = _BLOBS.alias(), _BLOBS.alias()
    query = (
        select(
            *(_TASKS.c.id, _TASKS.c.name, _BASES.c.name, samples.c.digest, eval_data.c.digest),
            *(_TASKS.c.pinned, _TASKS.c.folder, _TASKS.c.note, _TASKS.c.tags),
            *checks_of(_TASKS, _BASES, samples, eval_data),
        )
        .join_from(_TASKS, _BASES)
        .outerjoin(samples, _TASKS.c.samples_id == samples.c.id)
        .outerjoin(eval_data, _TASKS.c.eval_id == eval_data.c.id)
        .where(_TASKS.c.name.in_(names))
    )
    return [KnownTask(*row[:9]) for row in connection.execute(query)]


def _add_adapters(connection: Connection, ids: Sequence[int], tasks: dict[int, KnownTask]) -> None:
    query = adapter_rows(
        *(_ADAPTERS.c.task_id, WEIGHTS.c.digest, CONFIGS.c.digest, _ADAPTERS.c.step),
        *(_ADAPTERS.c.is_final, _ADAPTERS.c.evicted_at, _ADAPTERS.c.id, _ADAPTERS.c.initial_id, _PLACE),
    ).where(_ADAPTERS.c.task_id.in_(ids))
    for task_id, weight, setting, step, is_final, evicted_at, number, initial, place, *_ in connection.execute(query):
        task, key = tasks[task_id], (weight, setting, step)
        task = replace(task, adapters=task.adapters | {key})
        if initial is None and evicted_at is None:
            rows = (*task.without_initial.get(key[:2], ()), number)
            task = replace(task, without_initial={**task.without_initial, key[:2]: rows})
        if evicted_at is not None and is_bundle_source(place):
            task = replace(task, never_here=task.never_here | {number})
        if is_final:
            evicted = None if evicted_at is None else number
            task = replace(task, final=key[:2], final_row=number, evicted_final=evicted)
        elif evicted_at is not None:
            task = replace(task, evicted={**task.evicted, key: number})
        tasks[task_id] = task


def _add_files(connection: Connection, ids: Sequence[int], tasks: dict[int, KnownTask]) -> None:
    of_row = {tasks[number].final_row: number for number in ids}
    query = select(_EXTRAS.c.adapter_id, _EXTRAS.c.file).where(_EXTRAS.c.adapter_id.in_(of_row))
    for row, file in connection.execute(query):
        task = tasks[of_row[row]]
        tasks[of_row[row]] = replace(task, files=task.files | {file})


@dataclass(frozen=True)
class _Decision:
    """What is done about one task."""

    ingest: records.TaskIngest
    status: records.IngestStatus
    known: KnownTask | None  # None if it is not in the store, or will be replaced
    new: tuple[records.NewAdapter, ...]  # its adapters that are not in the store
    new_samples: bool
    new_eval_data: bool
    # its offered adapters whose weights were deleted -> row
    evicted: Mapping[AdapterKey, int] = field(default_factory=dict)
    replaced: KnownTask | None = None  # the task whose place it takes
    base_model: str = ""  # its name; for a known task, the one that it has from now on

    def outcome(self) -> records.IngestOutcome:
        name = self.ingest.name if self.known is None else self.known.name
        seen = 0 if self.status == "skipped" else len(self.ingest.adapters) - len(self.new)
        back = sum(map(self.comes_back, self.evicted))
        left = len(self.evicted) - back
        return records.IngestOutcome(name, len(self.new), seen, self.status, self.base_model, left, back)

    def comes_back(self, key: AdapterKey) -> bool:
        """Say whether the weights of an evicted adapter are stored: nobody here has checked what a bundle brought."""
        return self.ingest.restore or self.is_new_here(self.evicted[key])

    def is_new_here(self, row: int) -> bool:
        """Say whether the weights of an adapter have never been in the store."""
        return self.known is not None and row in self.known.never_here

    @property
    def is_moved(self) -> bool:
        """Whether a known task gets another base model."""
        return self.known is not None and self.status != "skipped" and self.known.base_model != self.base_model

    def folder(self) -> str:
        final = next(adapter for adapter in self.ingest.adapters if adapter.is_final)
        return task_folder(final.source) if self.known is None else self.known.folder

    def digests(self) -> Iterator[str]:
        """Yield the digests whose files must be there: all but the weights that stay evicted."""
        yield from filter(None, (self.ingest.samples, self.ingest.eval_data))
        for adapter in self.ingest.adapters:
            yield from filter(None, (adapter.config, adapter.card, *(extra.blob for extra in adapter.extras)))
            if _key(adapter) not in self.evicted or self.comes_back(_key(adapter)):
                yield from filter(None, (adapter.weights, adapter.initial))

    @property
    def new_files(self) -> list[records.Extra]:
        """Files next to the final adapter of a known task that came after it."""
        if self.known is None or self.status == "skipped":
            return []
        final = next(adapter for adapter in self.ingest.adapters if adapter.is_final)
        return [extra for extra in final.extras if extra.file is not None and extra.file not in self.known.files]

    def revised(self) -> Iterator[tuple[int, records.NewAdapter]]:
        """Yield the rows that take over what is known of their adapter now: it is back, or has its initial weights."""
        for adapter in self.ingest.adapters:
            if _key(adapter) in self.evicted and self.comes_back(_key(adapter)):
                yield self.evicted[_key(adapter)], adapter
            elif self.known is not None and self.status != "skipped" and adapter.initial is not None:
                rows = self.known.without_initial.get((adapter.weights, adapter.config), ())
                yield from ((number, adapter) for number in rows)


def plan_tasks(connection: Connection | None, tasks: Sequence[records.TaskIngest]) -> list[records.IngestOutcome]:
    """Return what an ingest would do; without a connection, into a store that is still to be made."""
    return [item.outcome() for item in _decide_all(connection, tasks)]


def record_tasks(
    connection: Connection, files: Blobs, ingests: Sequence[records.TaskIngest]
) -> list[records.IngestOutcome]:
    """Write the rows of tasks into an open transaction; see :meth:`registry.tables.tasks.Tasks.ingest`."""
    decisions = _decide_all(connection, ingests)
    for item in decisions:
        if item.replaced is not None:
            # Everything derived from the replaced task goes with it: foreign keys cascade.
            connection.execute(delete(_TASKS).where(_TASKS.c.id == item.replaced.id))
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
        raise ValueError("two tasks in the batch have the same name")
    # Case-insensitive, as the column is.
    known = {} if connection is None else known_tasks(connection, names)
    labels = {ingest.base_model for ingest in ingests}
    bases = {label: label for label in labels} if connection is None else names_of(connection, labels)
    return [_decide(known.get(ingest.name.lower()), ingest, bases[ingest.base_model]) for ingest in ingests]


def _decide(known: KnownTask | None, ingest: records.TaskIngest, base: str) -> _Decision:
    if known is None:
        return replace(_added(ingest), base_model=base)
    final = next(adapter for adapter in ingest.adapters if adapter.is_final)
    if known.final == (final.weights, final.config):
        # The same adapter again. Its label may mean another base model elsewhere, as a relative path does.
        if not ingest.base_is_told or known.base_model == base:
            return replace(_updated(known, ingest), base_model=known.base_model)
        if known.base_model == UNKNOWN_BASE:
            return replace(_updated(known, ingest), status="updated", base_model=base)
    if ingest.on_conflict == "fail":
        raise TaskConflict(known.name)
    if ingest.on_conflict == "skip":
        unchanged = _Decision(ingest, "skipped", known, (), new_samples=False, new_eval_data=False)
        return replace(unchanged, base_model=known.base_model)
    return replace(_added(ingest), status="replaced", replaced=known, base_model=base)


def _added(ingest: records.TaskIngest) -> _Decision:
    new = _unknown(ingest.adapters, set())
    return _Decision(ingest, "added", None, new, new_samples=True, new_eval_data=True)


def _updated(known: KnownTask, ingest: records.TaskIngest) -> _Decision:
    # A known task's final adapter is known by its bytes alone: it may have come from a checkpoint's folder.
    new = _unknown((adapter for adapter in ingest.adapters if not adapter.is_final), set(known.adapters))
    new_samples = ingest.samples not in (None, known.samples)
    new_eval_data = ingest.eval_data not in (None, known.eval_data)
    evicted = dict(_evicted(known, ingest.adapters))
    decision = _Decision(ingest, "known", known, new, new_samples, new_eval_data, evicted)
    is_revised = bool(decision.new_files) or any(True for _ in decision.revised())
    return replace(decision, status="updated") if new or new_samples or new_eval_data or is_revised else decision


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


def _write(connection: Connection, files: Blobs, decisions: Sequence[_Decision]) -> None:
    numbers = RowNumbers(connection, files)
    blobs = numbers.blobs(digest for item in decisions for digest in item.digests())
    revised = [(row, new) for item in decisions for row, new in item.revised()]
    placed = {row: item.folder() for item in decisions for row, _ in item.revised() if item.is_new_here(row)}
    described = [*(new for item in decisions for new in item.new), *(new for _, new in revised)]
    descriptions = numbers.documents(map(description_of, described))
    labels = find_labels(connection, {item.ingest.base_model for item in decisions})
    bases = numbers.base_models(name for name, _ in labels.values())
    places = {label: {"base_model_id": bases[name], "label_id": number} for label, (name, number) in labels.items()}
    now = utc_now()
    rows: list[dict[str, Any]] = []
    for item in decisions:
        task, folder = _task_number(connection, item, blobs, places[item.ingest.base_model], now), item.folder()
        rows.extend(
            {"task_id": task, "created_at": now, **_adapter_values(new, folder, blobs, descriptions)}
            for new in item.new
        )
    if rows:
        new = [new for item in decisions for new in item.new]
        made = connection.execute(insert(_ADAPTERS).returning(_ADAPTERS.c.id, sort_by_parameter_order=True), rows)
        _write_extras(connection, made.scalars().all(), [one.extras for one in new], blobs)
    # Only now: the weights of restored adapters must be there, which `blobs` above has checked.
    for row, adapter in revised:
        values = {
            "evicted_at": None,
            "initial_id": _number(blobs, adapter.initial),
            "description_id": descriptions[description_of(adapter)],
            "tensors_key": adapter.tensors_key,
        }
        if row in placed:  # until now its place was a bundle, and all that is known of it what that says
            values["source"] = unusual_source(adapter.source, placed[row], adapter.step, is_final=adapter.is_final)
            values["card_id"] = _number(blobs, adapter.card)
            connection.execute(delete(_EXTRAS).where(_EXTRAS.c.adapter_id == row))
        connection.execute(update(_ADAPTERS).where(_ADAPTERS.c.id == row).values(values))
    _write_extras(connection, [row for row, _ in revised], [new.extras for _, new in revised], blobs)
    more = [(item.known, item.new_files) for item in decisions if item.known is not None and item.new_files]
    _write_extras(connection, [known.final_row for known, _ in more], [files for _, files in more], blobs)


def _task_number(
    connection: Connection, item: _Decision, blobs: Mapping[str, int], place: Mapping[str, int | None], now: str
) -> int:
    """Bring the row of a task up to date and return its number."""
    texts: dict[str, int | None] = dict(place) if item.is_moved else {}
    if item.new_samples:
        texts["samples_id"] = _number(blobs, item.ingest.samples)
    if item.new_eval_data:
        texts["eval_id"] = _number(blobs, item.ingest.eval_data)
    if item.known is None:
        values: dict[str, Any] = {"name": item.ingest.name, "created_at": now, "folder": item.folder()}
        values |= {**place, **texts}
        if (old := item.replaced) is not None:  # what people said of the task still holds
            values |= {"pinned": old.pinned, "note": old.note, "tags": old.tags}
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
        "initial_id": _number(blobs, new.initial),
        "description_id": descriptions[description_of(new)],
        "source": unusual_source(new.source, folder, new.step, is_final=new.is_final),
        "tensors_key": new.tensors_key,
    }


def _write_extras(
    connection: Connection,
    adapters: Sequence[int],
    extras: Sequence[Sequence[records.Extra]],
    blobs: Mapping[str, int],
) -> None:
    values = [
        {"adapter_id": adapter, "file": extra.file or "", "blob_id": blobs[extra.blob], "size": extra.size}
        for adapter, new in zip(adapters, extras, strict=True)
        for extra in new
    ]
    # An adapter that was known may have some. Its tensors may be packed in another way now.
    for adapter, new in zip(adapters, extras, strict=True):
        if any(extra.file is None for extra in new):
            connection.execute(delete(_EXTRAS).where(_EXTRAS.c.adapter_id == adapter, _EXTRAS.c.file == ""))
    if values:
        connection.execute(insert_into(connection, _EXTRAS).on_conflict_do_nothing(), values)


def _number(blobs: Mapping[str, int], digest: str | None) -> int | None:
    return None if digest is None else blobs[digest]
