"""The rows of a store: what is true of them in every database.

    with database.read() as session:     one consistent state, and every row that is loaded is checked
    with database.write() as session:    one writer at a time, from the first statement to the commit
    with database.columns() as columns:  one consistent state, read by plain statements, and no row is checked unasked

A new kind of database derives from `Database`; `SqliteDatabase` in sqlite.py keeps the rows in a file.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from registry.errors import DamagedRow, DamagedStore, RegistryError, StoreReadOnly, StoreTooNew, StoreTooOld
from registry.row_checks import Value, WrongRow, find_wrong_rows, find_wrong_tasks
from registry.values import UnreadableValue

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from sqlalchemy import Connection, Engine, Table
    from sqlalchemy.orm import Session

    from registry.storage.locks import Patience

DAMAGE_HINT = "run `icm verify` to see what is damaged and how to repair it"
_TOO_OLD_HINT = (
    "ingest the adapters again from their folders into a new store (--store); export adapters that exist only in this "
    "store with `icm materialize`, using the icm version that wrote it"
)


@dataclass(frozen=True)
class Damage:
    """Something that is wrong with the database."""

    kind: Literal["database", "dangling", "row"]
    fact: str
    task: str | None = None  # that it is about, as far as it tells


class Columns(Protocol):
    """Plain statements on the columns of a store, in one consistent state; no row is checked unless that is asked for.

    A statement is one that every database understands, with `?` where a value belongs. It returns tuples of what is
    stored; a yes or no comes as 1 and 0 or as True and False.
    """

    def execute(self, statement: str, values: Sequence[Value] = ()) -> Rows:
        """Run a statement that returns few rows."""
        ...

    def stream(self, statement: str, values: Sequence[Value] = (), *, first: bool = False) -> Iterator[tuple[Any, ...]]:
        """Run a statement that may return very many rows, and yield them; few are in memory at a time.

        Most often the `first` ones are enough: they are to come soon, even if all together then take longer.
        """
        ...

    def in_any_case(self, column: str) -> str:
        """Return the SQL that orders by a column that is compared without case."""
        ...

    def first_wrong(self, table: str, condition: str) -> str | None:
        """Check the rows of a table that a condition holds for; say what is wrong with the first that fails."""
        ...

    def right_rows(self, table: str) -> str:
        """Return the SQL of the condition that a row of a table has the values that it was written with."""
        ...

    def are_right(self) -> bool:
        """Say whether all rows have the values that they were written with; stops at the first that has not."""
        ...


class Rows(Protocol):
    """What a statement has returned."""

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        """Yield the rows that are left."""
        ...

    def fetchone(self) -> Any:
        """Return the next row, or None."""
        ...

    def fetchall(self) -> list[Any]:
        """Return the rows that are left."""
        ...


class Database(ABC):
    """The rows of one store.

    Args:
        place: Where they are, for messages.
        root: Where the store is, for messages.
        read_only: Refuse writes.
        patience: How long to wait for others; what is waited for the lock to write is taken from it.

    Attributes:
        first_schema: The oldest that is moved forward.
    """

    first_schema: ClassVar[int]
    newest_schema: ClassVar = 10
    """The schema that this program reads and writes: the newest revision in `registry.storage.migrations`."""

    def __init__(self, place: str, root: str, *, read_only: bool, patience: Patience) -> None:
        self.place, self._root = place, root
        self.read_only = read_only
        self.patience = patience
        self._is_sound = False  # as far as anybody has looked
        self.is_kept = False  # whether a copy was made since: see `registry.storage.kept`

    @property
    @abstractmethod
    def _reader(self) -> Engine:
        """What opens transactions that only read."""

    @property
    @abstractmethod
    def _writer(self) -> Engine:
        """What opens transactions that hold the lock to write from their first statement."""

    @abstractmethod
    def connection(self, *, write: bool = False) -> AbstractContextManager[Connection]:
        """Open a transaction without the ORM; a `write` block is committed."""

    @abstractmethod
    def columns(self) -> AbstractContextManager[Columns]:
        """Read columns in one consistent state."""

    @abstractmethod
    def damage(self) -> Iterator[Damage]:
        """Yield what is wrong with the database, references and rows."""

    @abstractmethod
    def _translated_cause(self, error: BaseException) -> RegistryError | None:
        """Return what an error of the driver means to a store; None if it is a bug of ours."""

    def close(self) -> None:  # noqa: B027  # SQLite's connections are closed after each transaction
        """Give up all connections."""

    @abstractmethod
    def _wrong_in(self, connection: Connection, table: Table, fields: Sequence[str]) -> Iterator[tuple[Any, ...]]:
        """Yield what is wrong with each wrong row of a table, and some fields of it, SQL in which it is called `own`.

        The fields of a row that cannot be read are None.
        """

    def _seal(self, session: Session) -> None:  # noqa: B027  # SQLite has triggers for it
        """Do what is left to do before a commit."""

    def must_write(self) -> None:
        """Raise `StoreReadOnly` if the store was opened read-only."""
        if self.read_only:
            raise StoreReadOnly(f"the store {self._root} was opened read-only", path=self._root)

    def check_schema(self, schema: int) -> None:
        """Raise `StoreTooNew` or `StoreTooOld` unless a schema is this program's, or one to move forward."""
        if schema > self.newest_schema:
            fact = f"{self.place} has schema {schema}, and this icm supports schemas up to {self.newest_schema}"
            raise StoreTooNew(fact, path=self.place, hint="use the icm version that wrote it, or a newer one")
        if schema < self.first_schema:
            fact = f"{self.place} has schema {schema}; this icm supports schema {self.first_schema} and later"
            raise StoreTooOld(fact, path=self.place, hint=_TOO_OLD_HINT)

    @contextmanager
    def read(self) -> Iterator[Session]:
        """Open a session that sees one consistent state. Fetch and leave: a reader holds up commits."""
        from sqlalchemy.orm import Session

        with self._errors(), Session(self._reader, autoflush=False) as session:
            yield session

    @contextmanager
    def write(self) -> Iterator[Session]:
        """Open a session that holds the write lock from its first statement; leaving the block commits."""
        from sqlalchemy.orm import Session

        self.must_write()
        # Rows are flushed in few large statements, where the writer asks for it.
        with self._errors(), Session(self._writer, autoflush=False, expire_on_commit=False) as session, session.begin():
            yield session
            self._seal(session)

    def must_be_sound(self) -> None:
        """Raise if anything is wrong with any row: what may be deleted follows from all of them. Looks once."""
        if not self._is_sound:
            for found in self.damage():
                fact = f"{self.place}: {found.fact}; icm deletes nothing until this is repaired"
                raise DamagedRow(fact, path=self.place, hint=DAMAGE_HINT)
            self._is_sound = True

    def is_sound(self) -> bool:
        """Say whether nothing is wrong with any row; the first call looks."""
        try:
            self.must_be_sound()
        except DamagedStore:
            return False
        return True

    def wrong_tasks(self) -> dict[str, set[int]]:
        """Check every row; return what is wrong with one -> the numbers of the tasks whose figures depend on it."""
        from registry.schema import Base  # imports SQLAlchemy

        with self.connection() as connection:
            return find_wrong_tasks(connection, Base.metadata, self._wrong_in)

    def _wrong_rows(self, connection: Connection) -> Iterator[Damage]:
        """Check every row, and every adapter's number of extras."""
        from registry.schema import Base  # imports SQLAlchemy

        for fact, task in find_wrong_rows(connection, Base.metadata, self._wrong_in):
            yield Damage("row", fact, task)

    def damaged_row(self, fact: str) -> DamagedRow:
        """Return the error that says what is wrong with a row."""
        return DamagedRow(f"{self.place}: {fact}", path=self.place, hint=DAMAGE_HINT)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            translated = self._translated(error)
            if translated is None:  # a broken rule of the schema is a bug of ours
                raise
            raise translated from error

    def _translated(self, error: Exception) -> RegistryError | None:
        from sqlalchemy.exc import DBAPIError, NoResultFound  # slow, but something went wrong

        if isinstance(error, WrongRow):
            return self.damaged_row(str(error))
        if isinstance(error, (UnicodeDecodeError, UnreadableValue, NoResultFound)):
            return DamagedStore(f"{self.place}: {error}", path=self.place, hint=DAMAGE_HINT)
        cause = error.orig if isinstance(error, DBAPIError) else error
        return None if cause is None else self._translated_cause(cause)
