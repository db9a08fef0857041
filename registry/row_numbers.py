"""Rows that many others refer to, found or made many at a time, and known by their numbers.

An ingest refers to hundreds of blobs. With an object for each row, and statements that fetch it back, this took ten
times longer; so here are plain statements, and the number of a row is all that is kept of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar, cast

from sqlalchemy import Connection, Table, select
from sqlalchemy.dialects.sqlite import insert

from registry import models
from registry.blobs import BlobStore
from registry.writer import MAX_VARIABLES, document_digest

T = TypeVar("T")


def table_of(model: type[models.Base]) -> Table:
    """Return the table behind a class."""
    return cast(Table, model.__table__)


def in_parts(values: Sequence[T]) -> Iterator[Sequence[T]]:
    """Split values into parts that one statement takes as variables."""
    for at in range(0, len(values), MAX_VARIABLES):
        yield values[at : at + MAX_VARIABLES]


class RowNumbers:
    """Finds or makes the rows of blobs, JSON values and base models in an open transaction."""

    def __init__(self, connection: Connection, files: BlobStore) -> None:
        self._connection = connection
        self._files = files

    def blobs(self, digests: Iterable[str]) -> dict[str, int]:
        """Return digest -> number.

        The files are looked for under the write lock, so no row is ever committed whose bytes another process has
        removed.

        Raises:
            MissingBlob: there is no such file.
        """
        rows = {digest: {"size": self._files.size(digest)} for digest in sorted(set(digests))}
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
        """Insert those rows whose key the table lacks, correct one column of the others, return every row's number."""
        if not rows:
            return {}
        statement = insert(table)
        if corrected is None:
            statement = statement.on_conflict_do_nothing(index_elements=[key])
        else:
            new = statement.excluded[corrected]
            changes = table.c[corrected] != new
            statement = statement.on_conflict_do_update(index_elements=[key], set_={corrected: new}, where=changes)
        self._connection.execute(statement, [{key: name, **values} for name, values in rows.items()])
        found: dict[str, int] = {}
        for names in in_parts(list(rows)):
            query = select(table.c[key], table.c.id).where(table.c[key].in_(names))
            found |= {row[0]: row[1] for row in self._connection.execute(query)}
        return found
