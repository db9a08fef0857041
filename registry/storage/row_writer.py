"""Rows that other rows refer to, found or made in an open transaction.

:class:`RowWriter` works with SQLAlchemy's objects. :class:`RowNumbers` works with plain statements and the numbers of
rows: an ingest refers to hundreds of blobs, and with an object for each this took ten times longer.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, TypeVar, cast

from sqlalchemy import ColumnElement, Connection, LargeBinary, Select, String, Table, func, literal, select
from sqlalchemy import cast as cast_to
from sqlalchemy.orm import Session

from registry import records
from registry import schema as models
from registry.errors import TaskNotFound
from registry.schema import BaseModel, Blob, Document
from registry.storage.blobs.content import Blobs
from registry.values import compact_json

if TYPE_CHECKING:
    from sqlalchemy.dialects.sqlite import Insert

T = TypeVar("T")

MAX_VARIABLES = 500  # older SQLite takes at most 999 values in one `IN (...)`


class RowWriter:
    """Finds or makes the rows of blobs and base models in an open transaction."""

    def __init__(self, session: Session, blobs: Blobs) -> None:
        self.session = session
        self.now = utc_now()
        self._files = blobs
        self._blobs: dict[str, Blob | None] = {}  # None: looked for, has no row yet
        self._base_models: dict[str, BaseModel] = {}

    def blob(self, digest: str) -> Blob:
        """Return the row of a blob; raise `MissingBlob` if the store does not have its bytes."""
        row = self.absent_blob(digest, size := self._files.size(digest))
        row.size = size  # a bundle may have said something else of bytes that were not here
        return row

    def absent_blob(self, digest: str, size: int) -> Blob:
        """Return the row of a blob whose bytes the store need not have, because only evicted adapters refer to it."""
        if digest not in self._blobs:
            self.load_blobs([digest])
        row = self._blobs[digest]
        if row is None:
            row = self._blobs[digest] = Blob(digest=digest, size=size)
            self.session.add(row)
        return row

    def load_blobs(self, digests: Iterable[str]) -> None:
        """Fetch the rows of many blobs in few queries, before :meth:`blob` is called for each."""
        for some in in_parts(sorted(set(digests) - self._blobs.keys())):
            # Those without a row are remembered too, so that nobody looks for them again.
            self._blobs |= dict.fromkeys(some)
            query = select(Blob).where(Blob.digest.in_(some))
            self._blobs |= {row.digest: row for row in self.session.scalars(query)}

    def base_model(self, name: str) -> BaseModel:
        """Find or make the row of a base model, by any of its labels."""
        if name not in self._base_models:
            self._base_models[name] = self.find_base_model(name) or BaseModel(name=name)
            self.session.add(self._base_models[name])
        return self._base_models[name]

    def find_base_model(self, label: str) -> BaseModel | None:
        """Return the row of the base model that has a label, if there is one."""
        row = self.session.scalar(select(BaseModel).where(BaseModel.name == label))
        if row is None:
            query = select(BaseModel).join(models.BaseLabel, models.BaseLabel.base_model_id == BaseModel.id)
            row = self.session.scalar(query.where(models.BaseLabel.label == label))
        return row

    def forget_base_models(self) -> None:
        """Look base models up again, because one was deleted."""
        self._base_models.clear()


def named_blob(session: Session, digest: str) -> Blob:
    """Find or make the row of a blob that is only named, in an open transaction: its length is not known here."""
    row = session.scalar(select(Blob).where(Blob.digest == digest))
    if row is None:
        row = Blob(digest=digest, size=0)
        session.add(row)
        session.flush()
    return row


def document_row(session: Session, body: object) -> Document:
    """Find or make the row of a JSON value in an open transaction."""
    digest = document_digest(body)
    row = session.scalar(select(Document).where(Document.digest == digest))
    if row is None:
        row = Document(digest=digest, body=body)
        session.add(row)
        session.flush()
    return row


def document_digest(body: object) -> str:
    """Return what a JSON value is known by."""
    return hashlib.sha256(compact_json(body).encode()).hexdigest()


def utc_now() -> str:
    """Return the present time as RFC 3339 in UTC, to the second."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def table_of(model: type[models.Base]) -> Table:
    """Return the table behind a class."""
    return cast(Table, model.__table__)


def check_rows(session: Session, table: Table, *conditions: ColumnElement[bool]) -> None:
    """Raise unless the rows of a table that some conditions hold for have the values that they were written with."""
    session.execute(select(table.c.crc).where(*conditions)).all()


def in_parts(values: Sequence[T], most: int = MAX_VARIABLES) -> Iterator[Sequence[T]]:
    """Split values into parts that one statement takes as variables."""
    for at in range(0, len(values), most):
        yield values[at : at + most]


def listed(connection: Connection, texts: Iterable[str]) -> Select[str]:
    """Return a statement that selects these texts: one variable, however many they are."""
    if connection.dialect.name == "sqlite":
        return select(func.json_each(json.dumps(list(texts))).table_valued("value").c.value)
    from sqlalchemy.dialects.postgresql import ARRAY

    return select(func.unnest(literal(list(texts), ARRAY(String))))


def existing_adapters(session: Session, numbers: Sequence[int]) -> set[int]:
    """Return which rows of adapters there are."""
    adapter = models.Adapter
    parts = (select(adapter.id).where(adapter.id.in_(some)) for some in in_parts(numbers))
    return {number for part in parts for number in session.scalars(part)}


class RowNumbers:
    """Finds or makes the rows of blobs, JSON values and base models in an open transaction."""

    def __init__(self, connection: Connection, files: Blobs) -> None:
        self._connection = connection
        self._files = files

    def blobs(self, digests: Iterable[str]) -> dict[str, int]:
        """Return digest -> number; raise `MissingBlob` if the store does not have the bytes."""
        rows = {digest: {"size": size} for digest, size in self._files.sizes_of(digests).items()}
        # An imported bundle may have said something else of the size of bytes that were not here.
        return self._numbers(table_of(models.Blob), "digest", rows, corrected="size")

    def documents(self, bodies: Iterable[T]) -> dict[T, int]:
        """Return JSON value -> number; the values are given in a form that can be a key, such as tuples."""
        digests = {body: document_digest(body) for body in dict.fromkeys(bodies)}
        rows = {digest: {"body": body} for body, digest in digests.items()}
        numbers = self._numbers(table_of(models.Document), "digest", rows)
        return {body: numbers[digest] for body, digest in digests.items()}

    def base_models(self, names: Iterable[str]) -> dict[str, int]:
        """Return name -> number."""
        return self._numbers(table_of(models.BaseModel), "name", {name: {} for name in sorted(set(names))})

    def _numbers(
        self, table: Table, key: str, rows: Mapping[str, Mapping[str, Any]], *, corrected: str | None = None
    ) -> dict[str, int]:
        """Insert the rows that are not in the table, correct one column of the others, return the number of each."""
        found = {} if corrected is not None else self._found(table, key, list(rows))
        made = [{key: name, **values} for name, values in rows.items() if name not in found]
        if not made:
            return found
        statement = insert_into(self._connection, table)
        if corrected is not None:
            new = statement.excluded[corrected]
            changes = table.c[corrected] != new
            statement = statement.on_conflict_do_update(index_elements=[key], set_={corrected: new}, where=changes)
        self._connection.execute(statement, made)
        return found | self._found(table, key, [row[key] for row in made])

    def _found(self, table: Table, key: str, names: Sequence[str]) -> dict[str, int]:
        found: dict[str, int] = {}
        for some in in_parts(names):
            query = select(table.c[key], table.c.id).where(table.c[key].in_(some))
            found |= {row[0]: row[1] for row in self._connection.execute(query)}
        return found


def insert_into(connection: Connection, table: Table) -> Insert:
    """Return a statement that inserts rows, and may say what happens where one is there already."""
    if connection.dialect.name == "sqlite":
        from sqlalchemy.dialects import sqlite

        return sqlite.insert(table)
    from sqlalchemy.dialects import postgresql

    return cast("Insert", postgresql.insert(table))


def task_named(session: Session, name: str) -> models.Task | None:
    """Return a task by name, in any case and composed or not; None if there is none."""
    composed = unicodedata.normalize("NFC", name)
    task = session.scalar(select(models.Task).where(models.Task.name == composed))
    if task is None and not composed.isascii():
        same = same_names(session.connection(), [composed])
        task = session.scalar(select(models.Task).where(models.Task.name.in_(same)))
    return task


def same_names(connection: Connection, names: Sequence[str]) -> list[str]:
    """Return names, and those of the store that differ from them in case only."""
    if all(map(str.isascii, names)):  # the column compares ASCII letters in any case, and no others
        return list(names)
    wanted = {name.lower() for name in names}
    return [*names, *(name for name in names_beyond_ascii(connection) if name.lower() in wanted)]


def names_beyond_ascii(connection: Connection) -> Sequence[str]:
    """Return the names of tasks with other letters than ASCII's, which no database lowers as Python does."""
    name = table_of(models.Task).c.name
    is_sqlite = connection.dialect.name == "sqlite"
    size = func.length(cast_to(name, LargeBinary)) if is_sqlite else func.octet_length(name)
    return connection.execute(select(name).where(size > func.length(name))).scalars().all()


def find_task(session: Session, name: str) -> models.Task:
    """Return a task by name, as `task_named` does; raise `TaskNotFound`, with the closest names, if there is none."""
    task = task_named(session, name)
    if task is None:
        # Names differ in case only by accident, so the search does not see case.
        names = {found.lower(): found for found in session.scalars(select(models.Task.name))}
        close = difflib.get_close_matches(name.lower(), names, n=3)
        raise TaskNotFound(name, tuple(names[match] for match in close))
    return task


def find_final(session: Session, task_id: int) -> models.Adapter | None:
    """Return the final adapter of a task; only a damaged store has a task without one."""
    adapter = models.Adapter
    return session.scalar(select(adapter).where(adapter.task_id == task_id, adapter.is_final))


def final_if_unchanged(session: Session, seen: records.AdapterRecord) -> models.Adapter | None:
    """Return the row of an adapter that was encoded or measured; None if its task has another one by now."""
    final = final_under_any_name(session, seen)
    return None if final is None or final.task.name != seen.task else final


def final_under_any_name(session: Session, seen: records.AdapterRecord) -> models.Adapter | None:
    """Return the row of an adapter that was encoded, also if its task was renamed meanwhile."""
    row = session.get(models.Adapter, seen.id)
    # The number of a deleted row is given to the next one, so the digests are compared too.
    if row is None or not row.is_final or (row.weights.digest, row.config.digest) != (seen.weights, seen.config):
        return None
    return row
