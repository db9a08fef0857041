"""What the tasks of a store are recognised by when adapters are met again, looked up for those that were found.

A store may have a million tasks and an ingest one adapter. So nothing here reads all rows: what is found is asked for,
many at a time, and where there is no index the database looks through its rows and returns the few that are meant.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    Executable,
    FromClause,
    Select,
    String,
    and_,
    false,
    func,
    or_,
    select,
    union,
)

from registry import schema as models
from registry.names import folded, is_bundle_source
from registry.records import EvictedAdapter, TaskOrigin
from registry.row_checks import COLUMN
from registry.storage.database import Database
from registry.storage.row_writer import MAX_VARIABLES, in_parts, listed, names_beyond_ascii, same_names, table_of
from registry.to_records import task_folder, usual_source

_TASKS, _ADAPTERS, _BLOBS = map(table_of, (models.Task, models.Adapter, models.Blob))
WEIGHTS, CONFIGS = _BLOBS.alias(), _BLOBS.alias()
"""The files of an adapter, in a statement of `adapter_rows`."""


class Origins:
    """The tasks of a store, by what they are recognised by; what was asked once is remembered."""

    def __init__(self, database: Database) -> None:
        self._db = database
        self._known: dict[str, TaskOrigin | None] = {}  # by name in lower case; None: there is no such task

    def named(self, names: Iterable[str]) -> dict[str, TaskOrigin]:
        """Return the tasks with these names, in any case, by name in lower case."""
        wanted = {name.lower() for name in names}
        if unknown := sorted(wanted - self._known.keys()):
            with self._db.connection() as connection:
                same = listed(connection, map(folded, same_names(connection, unknown)))
                self._find(connection, select(_TASKS.c.id).where(_TASKS.c.name.in_(same)))
            self._known = dict.fromkeys(unknown) | self._known
        return {name: origin for name in wanted if (origin := self._known[name]) is not None}

    def from_places(self, places: Iterable[str]) -> dict[str, list[TaskOrigin]]:
        """Return the tasks that have an adapter from one of these places, by place, in order of names."""
        wanted = set(places)
        with self._db.connection() as connection:
            # A row has the place of its adapter only if it is not the usual one below the folder of its task.
            unusual = select(_ADAPTERS.c.task_id).where(_ADAPTERS.c.source.in_(listed(connection, wanted)))
            folders = wanted.union(map(task_folder, wanted))
            usual = select(_TASKS.c.id).where(_TASKS.c.folder.in_(listed(connection, folders)))
            origins = self._find(connection, union(unusual, usual))
        found = defaultdict[str, list[TaskOrigin]](list)
        for origin in origins:
            for place in wanted.intersection(origin.sources):
                found[place].append(origin)
        return found

    def with_tensors(self, finals: Iterable[tuple[str, str | None]]) -> list[TaskOrigin]:
        """Return the tasks whose final adapter has the digest of the weights, or the tensors' key, of one of these."""
        found: list[TaskOrigin] = []
        with self._db.connection() as connection:
            for some in in_parts(list(finals), MAX_VARIABLES // 2):
                blobs = select(_BLOBS.c.id).where(_BLOBS.c.digest.in_([weights for weights, _ in some]))
                keys = [key for _, key in some if key is not None]
                is_same = or_(_ADAPTERS.c.weights_id.in_(blobs), _ADAPTERS.c.tensors_key.in_(keys))
                found += self._find(connection, select(_ADAPTERS.c.task_id).where(_ADAPTERS.c.is_final, is_same))
        return found

    def ending_with(self, ends: Iterable[str]) -> Iterator[tuple[str, str]]:
        """Yield name and place of the tasks whose names end with `-` and one of these texts, in any case.

        There may be very many of them, so nothing is remembered, and a few are in memory at a time.
        """
        columns = (_TASKS.c.name, _TASKS.c.folder, _ADAPTERS.c.source, _ADAPTERS.c.step, _ADAPTERS.c.is_final)
        query = adapter_rows(*columns).where(_ADAPTERS.c.is_final)
        with self._db.connection() as connection:
            has_end = _ends_with(connection, {f"-{end.lower()}" for end in ends})
            for some in in_parts(connection.execute(select(_TASKS.c.id).where(has_end)).scalars().all()):
                for name, *row in connection.execute(query.where(_TASKS.c.id.in_(some))):
                    yield name, _place(*row[:4])

    def _find(self, connection: Connection, numbers: Executable) -> list[TaskOrigin]:
        """Return the tasks whose numbers a statement selects, in order of names, and remember them."""
        # Two statements: PostgreSQL does not foresee that the first one finds few, and would read all adapters.
        ids = connection.execute(numbers).scalars().all()
        found = [origin for some in in_parts(ids) for origin in _origins(connection, some)]
        found.sort(key=lambda origin: folded(origin.name))
        self._known |= {origin.name.lower(): origin for origin in found}
        return found


def adapter_rows(*columns: Any) -> Select[Any]:
    """Return a statement that selects columns of adapters, with their tasks and their files, and checks the rows."""
    query = select(*columns, *checks_of(_TASKS, _ADAPTERS, WEIGHTS, CONFIGS)).join_from(_ADAPTERS, _TASKS)
    query = query.join(WEIGHTS, _ADAPTERS.c.weights_id == WEIGHTS.c.id)
    return query.join(CONFIGS, _ADAPTERS.c.config_id == CONFIGS.c.id)


def checks_of(*tables: FromClause) -> list[ColumnElement[int]]:
    """Return the columns that a statement asks for to have the rows of these tables checked."""
    return [table.c[COLUMN] for table in tables]


def _origins(connection: Connection, ids: Sequence[int]) -> Collection[TaskOrigin]:
    query = adapter_rows(
        *(_TASKS.c.name, _TASKS.c.folder, _ADAPTERS.c.source, _ADAPTERS.c.step, _ADAPTERS.c.is_final),
        *(WEIGHTS.c.digest, WEIGHTS.c.size, CONFIGS.c.digest, _ADAPTERS.c.tensors_key, _ADAPTERS.c.evicted_at),
    ).where(_ADAPTERS.c.task_id.in_(ids))
    query = query.order_by(_ADAPTERS.c.is_final.desc(), _ADAPTERS.c.id)
    found: dict[str, TaskOrigin] = {}
    for name, folder, source, step, is_final, digest, size, config, key, evicted_at, *_ in connection.execute(query):
        place = _place(folder, source, step, is_final)
        if is_final:
            found[name] = TaskOrigin(name, digest, size, config, (), key)
        if (origin := found.get(name)) is None:  # it has no final adapter: the store is damaged
            continue
        evicted = origin.evicted
        if evicted_at is not None and not is_bundle_source(place):
            evicted = (*evicted, EvictedAdapter(name, digest, config, step, is_final))
        found[name] = replace(origin, sources=(*origin.sources, place), evicted=evicted)
    return found.values()


def _place(folder: str, source: str | None, step: int | None, is_final: bool) -> str:
    return usual_source(folder, step, is_final=is_final) if source is None else source


def _ends_with(connection: Connection, ends: set[str]) -> ColumnElement[bool]:
    """Return the condition that the name of a task is longer than one of these texts and ends with it, in any case."""
    name, by_length = _TASKS.c.name, defaultdict[int, list[str]](list)
    for end in filter(str.isascii, ends):
        by_length[len(end)].append(end)
    conditions: list[ColumnElement[bool]] = [false()]
    for length, some in by_length.items():
        tail = func.lower(func.substr(name, func.length(name) - length + 1), type_=String)
        conditions.append(and_(func.length(name) > length, tail.in_(listed(connection, some))))
    if not all(map(str.isascii, ends)):  # no database lowers other letters as Python does
        met = (name for name in names_beyond_ascii(connection) if not ends.isdisjoint(_ends_of(name.lower())))
        conditions.append(name.in_(listed(connection, map(folded, met))))
    return or_(*conditions)


def _ends_of(name: str) -> Iterator[str]:
    return (name[place:] for place, letter in enumerate(name) if letter == "-")
