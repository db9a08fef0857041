"""The database of a store: refs, history and meta, through SQLAlchemy Core.

    with database.read() as connection:     one consistent state
    with database.write() as connection:    one writer at a time, from the first statement to the commit

A new kind of database derives from `Database`; `SqliteDatabase` keeps the tables in a file, `PostgresDatabase` on a
server.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple
from uuid import uuid4

from sqlalchemy import Connection, insert, select, update
from sqlalchemy.exc import DBAPIError

from registry.errors import DamagedStore, RegistryError, StoreReadOnly, StoreTooOld
from registry.files import failpoint
from registry.tables import FORMAT, META, METADATA, REPAIR_HINT

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from registry.storage.locks import Deadline

OLD_HINT = "ingest the adapters again into a new store (--store), or use the icm version that wrote it"


class Meta(NamedTuple):
    """The one row of META."""

    store: str
    format: int
    blobs: str | None
    changes: int
    seq: int


def too_old(place: object) -> StoreTooOld:
    """Return the error for a store of icm 0.x."""
    return StoreTooOld(f"{place} was created by icm 0.x, which this version does not read", hint=OLD_HINT)


class Database(ABC):
    """The tables of one store.

    Attributes:
        meta_hint: What to do if META is lost.

    Args:
        place: Where they are, for messages.
        root: Where the store is, for messages.
        read_only: Refuse writes.
        deadline: How long to wait for others; the time spent waiting for the write lock is taken from it.
    """

    meta_hint = REPAIR_HINT

    def __init__(self, place: str, root: str, *, read_only: bool, deadline: Deadline) -> None:
        self.place, self._root = place, root
        self.read_only, self.deadline = read_only, deadline

    @abstractmethod
    def _reading(self) -> AbstractContextManager[Connection]:
        """Open a transaction that reads one consistent state."""

    @abstractmethod
    def _writing(self) -> AbstractContextManager[Connection]:
        """Open a transaction that holds the write lock from its first statement."""

    @abstractmethod
    def rebuild(self) -> AbstractContextManager[Connection]:
        """Open a transaction on empty tables, which replace the present ones when the block ends."""

    @abstractmethod
    def damage(self) -> Iterator[str]:
        """Yield errors in the pages of the database."""

    @abstractmethod
    def size(self) -> int:
        """Return the bytes that the tables take."""

    @abstractmethod
    def close(self) -> None:
        """Release all connections."""

    @abstractmethod
    def _translated_cause(self, error: BaseException) -> RegistryError | None:
        """Return the store's error for an error of the driver; None if it is a bug of ours."""

    def must_write(self) -> None:
        """Raise `StoreReadOnly` if the store was opened read-only."""
        if self.read_only:
            raise StoreReadOnly(f"the store {self._root} was opened read-only", path=self._root)

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """Open a transaction that sees one consistent state. Fetch and leave: a reader holds up commits."""
        with self._errors(), self._reading() as connection:
            yield connection

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """Open a transaction that holds the write lock; leaving the block commits, an exception rolls back."""
        self.must_write()
        with self._errors(), self._writing() as connection:
            yield connection
            connection.execute(update(META).values(changes=META.c.changes + 1))
            failpoint("rows-before-commit")
        failpoint("rows-committed")

    def meta(self) -> Meta:
        """Return which store this is."""
        with self.read() as connection:
            return self._meta(connection)

    def _meta(self, connection: Connection) -> Meta:
        rows = connection.execute(select(META)).all()
        if len(rows) == 1:
            meta = Meta(*rows[0])
            if isinstance(meta.store, str) and isinstance(meta.changes, int) and isinstance(meta.seq, int):
                return meta
        raise DamagedStore(f"{self.place} does not identify its store", path=self.place, hint=self.meta_hint)

    def changes(self) -> int:
        """Return how many transactions have written."""
        return self.meta().changes

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            cause = error.orig if isinstance(error, DBAPIError) and error.orig is not None else error
            translated = self._translated_cause(cause)
            if isinstance(error, UnicodeDecodeError):
                translated = DamagedStore(f"{self.place}: {error}", path=self.place, hint=REPAIR_HINT)
            if translated is None:  # a broken rule of the tables is a bug of ours
                raise
            raise translated from error


def make_tables(connection: Connection, store: str | None = None, blobs: str | None = None, changes: int = 0) -> None:
    """Make the tables and the row of META, unless they are there."""
    METADATA.create_all(connection)
    if connection.execute(select(META)).first() is None:
        row = {"store": store or uuid4().hex, "format": FORMAT, "blobs": blobs, "changes": changes, "seq": 0}
        connection.execute(insert(META), row)
