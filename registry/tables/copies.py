"""Rows of tasks as another store can take them: nothing in them is a number of the store that they come from.

    a file          its SHA-256 and its size        a generator     the SHA-256 of its file
    a document      the JSON value                  an adapter      its place among those of its task
    a base model    its name                        a label         itself

What a store has is never changed: a task that it has, with the same adapter, gets the rows that it lacks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sqlalchemy import ColumnElement, func, select
from sqlalchemy import Table as SqlTable
from sqlalchemy.orm import Session

from registry import schema as models
from registry.errors import BaseModelConflict, GeneratorConflict, TaskConflict
from registry.row_checks import COLUMN
from registry.storage.row_writer import (
    RowWriter,
    document_row,
    find_final,
    find_task,
    insert_into,
    table_of,
    task_named,
)
from registry.tables.generators import find_current
from registry.tables.table import Table

Values = Mapping[str, Any]  # of a row, by column

_TASKS, _ADAPTERS, _GENERATORS = map(table_of, (models.Task, models.Adapter, models.Generator))
_BASES, _LABELS = map(table_of, (models.BaseModel, models.BaseLabel))
_OF_TASK = tuple(map(table_of, (models.TaskVector, models.Code, models.Evaluation)))  # after its adapters
_OWN = {"id", COLUMN, "extra_count"}  # what each store says by itself
_WEIGHTS = ("weights_id", "initial_id")
_NEED_NO_BYTES = {*(("adapters", name) for name in _WEIGHTS), ("evaluations", "data_id")}


@dataclass(frozen=True)
class File:
    """A file that a row refers to."""

    digest: str
    size: int
    is_needed: bool  # whether the row is worth nothing without its bytes
    is_let_go: bool = False  # whether it is of an evicted adapter: where its bytes still are, they go soon


@dataclass(frozen=True)
class BaseRows:
    """A base model with its labels and generators."""

    base: Values
    labels: Sequence[Values]
    generators: Sequence[Values]  # parents first

    @property
    def names(self) -> list[str]:
        """All its names."""
        return [self.base["name"], *(label["label"] for label in self.labels)]

    def current(self) -> str | None:
        """Return the digest of the generator in use."""
        return next((row["blob_id"].digest for row in self.generators if row["is_current"]), None)

    def ancestors(self, digest: str) -> Iterator[str]:
        """Yield the digests of a generator and of those that it was made from, newest first."""
        parent_of = {row["blob_id"].digest: row["parent_id"] for row in self.generators}
        at: str | None = digest
        while at is not None:
            yield at
            at = parent_of[at]


@dataclass(frozen=True)
class TaskRows:
    """A task with everything that belongs to it."""

    base_model: str
    task: Values
    adapters: Sequence[Values]
    extras: Sequence[Sequence[Values]]  # of each adapter
    others: Sequence[Sequence[Values]]  # vectors, codes and measurements

    @property
    def name(self) -> str:
        """The name of the task."""
        return str(self.task["name"])

    @property
    def final(self) -> Values:
        """Its final adapter."""
        return next(row for row in self.adapters if row["is_final"])

    def files(self) -> dict[str, File]:
        """Return the files that its rows refer to by digest."""
        rows = [self.task, *self.adapters, *(row for some in (*self.extras, *self.others) for row in some)]
        return files_of(rows)

    def code_of(self, generator: str | None) -> Values | None:
        """Return its code under a generator."""
        return next((row for row in self.others[1] if row["generator_id"] == generator), None)


def files_of(rows: Sequence[Values]) -> dict[str, File]:
    """Return the files that rows refer to by digest; one that any of them needs is needed."""
    found: dict[str, File] = {}
    for file in (value for row in rows for value in row.values() if isinstance(value, File)):
        known = found.get(file.digest)
        if known is None or known.is_let_go or file.is_needed:
            found[file.digest] = file
    return found


class Copies(Table):
    """Rows that go from store to store."""

    def base(self, name: str) -> BaseRows:
        """Read a base model with its labels and generators."""
        with self._db.read() as session:
            (row,) = session.execute(select(_BASES).where(_BASES.c.name == name)).mappings()
            read = _Reader(session)
            of_base = [
                list(read.rows(table, table.c.base_model_id == row["id"], order))
                for table, order in ((_LABELS, _LABELS.c.id), (_GENERATORS, _GENERATORS.c.version))
            ]
            return BaseRows(read.row(_BASES, row), *of_base)

    def task(self, name: str) -> TaskRows:
        """Read a task with everything that belongs to it."""
        extra = table_of(models.Extra)
        with self._db.read() as session:
            found, read = find_task(session, name), _Reader(session)
            (row,) = session.execute(select(_TASKS).where(_TASKS.c.id == found.id)).mappings()
            query = select(_ADAPTERS).where(_ADAPTERS.c.task_id == found.id).order_by(_ADAPTERS.c.id)
            adapters = list(session.execute(query).mappings())
            read.adapters = {adapter["id"]: place for place, adapter in enumerate(adapters)}
            return TaskRows(
                found.base_model.name,
                read.row(_TASKS, row),
                [read.adapter(adapter) for adapter in adapters],
                [list(read.rows(extra, extra.c.adapter_id == adapter["id"], extra.c.file)) for adapter in adapters],
                [list(read.rows(table, table.c.task_id == found.id, table.c.id)) for table in _OF_TASK],
            )

    def add_base(self, new: BaseRows) -> str:
        """Record what is missing of a base model, its labels and generators; return what this store calls it.

        A generator is in use afterwards only if the store had none for this base model.

        Raises:
            BaseModelConflict: The store has another model of that name.
        """
        with self._write() as writer:
            base = next(filter(None, map(writer.find_base_model, new.names)), None)
            if base is None:
                base = models.BaseModel(**new.base)
                writer.session.add(base)
            elif (
                None not in (base.fingerprint, new.base["fingerprint"]) and base.fingerprint != new.base["fingerprint"]
            ):
                fact = f"the target store uses the name {base.name!r} for another model"
                raise BaseModelConflict(
                    fact, hint="run `icm base ls` in both stores, then rename one with `icm base alias`"
                )
            writer.session.flush()
            write = _Writer(writer, base.id)
            for label in new.labels:
                if writer.find_base_model(label["label"]) is None:
                    write.row(_LABELS, label)
            is_first = find_current(writer.session, base.name) is None
            for generator in new.generators:
                if write.generators.get(generator["blob_id"].digest) is None:
                    write.generator(generator, is_current=is_first and generator["is_current"])
            return base.name

    def check(self, new: TaskRows, base_model: str) -> bool:
        """Say whether the store has a task already, with the same adapter.

        Raises:
            TaskConflict: It has another one of that name.
            GeneratorConflict: The task has nothing but a code, and this is not of the generator in use here.
        """
        with self._db.read() as session:
            known = task_named(session, new.name)
            if known is not None:
                return _is_same(session, known, new, base_model)
            current = find_current(session, base_model)
            in_use = None if current is None else current.blob.digest
            if new.final["evicted_at"] is not None and new.code_of(in_use) is None:
                fact = f"the code of {new.name!r} is the only copy, and the target store uses another generator"
                raise GeneratorConflict(fact, hint="copy it to a separate store")
        return False

    def add_task(self, new: TaskRows, base_model: str) -> bool:
        """Record a task, or what is missing of it, in one transaction; say whether anything was new.

        Raises:
            TaskConflict: The store has another task of that name.
        """
        with self._write() as writer:
            session = writer.session
            known, base = task_named(session, new.name), writer.base_model(base_model)
            if known is not None:
                _is_same(session, known, new, base_model)
            write = _Writer(writer, base.id)
            write.task = write.row(_TASKS, new.task) if known is None else known.id
            have = {} if known is None else _keys_of(session, known.id)
            for adapter, extras in zip(new.adapters, new.extras, strict=True):
                number = have.get(_key_of(adapter))
                write.adapters.append(write.row(_ADAPTERS, adapter) if number is None else number)
                there = _files_next_to(session, number) if extras and number is not None else set[str]()
                for extra in extras:
                    # A file that came later, such as a context. The tensors of an adapter that is there are there.
                    if number is None or (extra["file"] and extra["file"] not in there):
                        write.row(table_of(models.Extra), {**extra, "adapter_id": len(write.adapters) - 1})
            for table, rows in zip(_OF_TASK, new.others, strict=True):
                for row in rows:
                    write.row(table, row)
            return write.count > 0


class _Reader:
    """Turns rows of an open transaction into values that hold everywhere."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self.adapters: Mapping[int, int] = {}  # number -> place among those of the task

    def rows(self, table: SqlTable, condition: ColumnElement[bool], order: ColumnElement[Any]) -> Iterator[Values]:
        """Read some rows of a table."""
        for row in self._session.execute(select(table).where(condition).order_by(order)).mappings():
            yield self.row(table, row)

    def row(self, table: SqlTable, values: Mapping[Any, Any]) -> Values:
        """Return a row that was read, without numbers."""
        return {
            column.name: self._value(table, column, values[column])
            for column in table.columns
            if column.name not in _OWN
        }

    def adapter(self, row: Mapping[Any, Any]) -> Values:
        """Return the row of an adapter."""
        values = self.row(_ADAPTERS, row)
        if row["evicted_at"] is None:
            return values
        let_go = {name: replace(values[name], is_let_go=True) for name in _WEIGHTS if values[name] is not None}
        return {**values, **let_go}

    def _value(self, table: SqlTable, column: Any, value: Any) -> Any:
        parent = _parent_of(column)
        if parent in (None, "base_models", "tasks") or value is None:
            return value
        if parent == "adapters":
            return self.adapters[value]
        found = self._session.get(_MODEL_OF[parent], value)
        if isinstance(found, models.Blob):
            return File(found.digest, found.size, (table.name, column.name) not in _NEED_NO_BYTES)
        if isinstance(found, models.Document):
            return found.body
        if isinstance(found, models.BaseLabel):
            return found.label
        assert isinstance(found, models.Generator)
        return found.blob.digest


class _Writer:
    """Writes such rows in an open transaction, without those that are there."""

    def __init__(self, writer: RowWriter, base: int) -> None:
        self._writer, self._session, self._base = writer, writer.session, base
        self.task: int | None = None
        self.adapters: list[int] = []  # by place
        self.count = 0  # rows written
        generator, label = models.Generator, models.BaseLabel
        query = select(models.Blob.digest, generator.id, generator.crc).join(generator.blob)
        rows = self._session.execute(query.where(generator.base_model_id == base))
        self.generators = {digest: number for digest, number, _ in rows}
        labels = self._session.execute(select(label.label, label.id, label.crc).where(label.base_model_id == base))
        self._labels = {name: number for name, number, _ in labels}

    def row(self, table: SqlTable, values: Values) -> int:
        """Write a row, unless one with its key is there; returns its number, 0 for one that is there or has none."""
        stored = {column.name: self._value(column, values.get(column.name)) for column in table.columns}
        stored = {name: value for name, value in stored.items() if name not in _OWN}
        if table is _OF_TASK[0]:  # the table has no rowids, so nobody else numbers its rows
            stored["id"] = 1 + (self._session.scalar(select(func.max(table.c.id))) or 0)
        new = insert_into(self._session.connection(), table)
        statement = new.values(stored).on_conflict_do_nothing()
        if "id" not in table.columns or table is _OF_TASK[0]:
            written = self._session.execute(statement.returning(*table.primary_key.columns)).first()
            self.count += written is not None
            return 0
        number = self._session.scalar(statement.returning(table.c.id))
        self.count += number is not None
        return number or 0

    def generator(self, values: Values, *, is_current: bool) -> None:
        """Write a generator, under the next version if its own is taken."""
        of_base = select(_GENERATORS.c.version).where(_GENERATORS.c.base_model_id == self._base)
        taken = set(self._session.scalars(of_base))
        version = values["version"] if values["version"] not in taken else max(taken) + 1
        new = {**values, "version": version, "is_current": is_current}
        self.generators[values["blob_id"].digest] = self.row(_GENERATORS, new)

    def _value(self, column: Any, value: Any) -> Any:
        parent = _parent_of(column)
        if parent == "base_models":
            return self._base
        if parent == "tasks":
            return self.task
        if parent is None or value is None:
            return value
        if parent == "adapters":
            return self.adapters[value]
        if parent == "generators":
            return self.generators.get(value)
        if parent == "base_labels":
            return self._labels.get(value)
        if parent == "documents":
            return document_row(self._session, value).id
        row = self._writer.blob(value.digest) if value.is_needed else self._writer.absent_blob(value.digest, value.size)
        self._session.flush()
        return row.id


_MODEL_OF: Mapping[str, Any] = {
    "blobs": models.Blob,
    "documents": models.Document,
    "base_labels": models.BaseLabel,
    "generators": models.Generator,
}


def _parent_of(column: Any) -> str | None:
    """Return the table that a column refers to."""
    return next((str(key.column.table.name) for key in column.foreign_keys), None)


def _is_same(session: Session, known: models.Task, new: TaskRows, base_model: str) -> bool:
    """Return True if a task has the adapter of another store's; raise `TaskConflict` if not."""
    final = find_final(session, known.id)
    ours = None if final is None else (known.base_model.name, final.weights.digest, final.config.digest)
    if ours != (base_model, new.final["weights_id"].digest, new.final["config_id"].digest):
        fact = f"the target store already has a task {known.name!r} with a different adapter"
        raise TaskConflict(known.name, fact=fact, choices=None)
    return True


def _keys_of(session: Session, task: int) -> dict[tuple[str, str, int | None], int]:
    """Return what tells the adapters of a task apart, with the number of each."""
    rows = session.scalars(select(models.Adapter).where(models.Adapter.task_id == task))
    return {(row.weights.digest, row.config.digest, row.step): row.id for row in rows}


def _files_next_to(session: Session, adapter: int) -> set[str]:
    """Return the names of the files that are kept next to an adapter."""
    return set(session.scalars(select(models.Extra.file).where(models.Extra.adapter_id == adapter)))


def _key_of(adapter: Values) -> tuple[str, str, int | None]:
    return adapter["weights_id"].digest, adapter["config_id"].digest, adapter["step"]
