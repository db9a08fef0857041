"""SQLite, set up so that nothing is lost, done by half, or waited for in silence.

The rollback journal is used, not WAL: SQLite 3.7.0 to 3.51.2 can corrupt a WAL database in rare races, and icm makes
few commits. Writers begin with BEGIN IMMEDIATE, because Python's default transactions lose updates: a transaction
that reads first and writes later would work from values that another one has replaced.

A store of an older schema is moved forward when it is opened. Its number is in the head of the file, which is read
before anything else: an icm that is older than that refuses the store by it.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from registry.errors import (
    DamagedRow,
    DamagedStore,
    NotAStore,
    RegistryError,
    StoreFull,
    StoreIOError,
    StoreLocked,
    StoreReadOnly,
)
from registry.row_checks import REFUSED, Value, add_functions, are_right, first_wrong, is_right, wrong_in
from registry.storage.database import DAMAGE_HINT, Damage, Database

if TYPE_CHECKING:
    from sqlalchemy import Connection, Engine, Table

    from registry.storage.locks import Patience

# SQLite's smallest: most of two dozen tables and indexes fill less than a page. The rows of 20 tasks with vectors,
# codes and evaluations take 53 KB; with pages of 4096 bytes they take 115 KB.
PAGE_SIZE = 512

READ, WRITE = "BEGIN", "BEGIN IMMEDIATE"
_LEAST_WAIT = 1.0  # seconds: a commit of another process takes a moment, and is not to end a command that waited before
_PRAGMAS = (
    # SQLite ignores foreign keys unless each connection asks for them.
    "foreign_keys=ON",
    # A commit that was acknowledged survives power loss.
    "synchronous=FULL",
    # A database file from elsewhere may hold hostile views and triggers.
    "trusted_schema=OFF",
    "cell_size_check=ON",
    # A read error of a mapped file is a signal that kills the process, not an error.
    "mmap_size=0",
    # Triggers are temporary: they need neither a folder nor space for that.
    "temp_store=MEMORY",
)


class SqliteDatabase(Database):
    """The rows of one store in a file."""

    first_schema = 8  # that of icm 0.9

    def __init__(
        self, path: Path, *, read_only: bool, patience: Patience, users: Callable[[Path], str] = lambda path: ""
    ) -> None:
        """Prepare to connect; nothing is opened yet.

        Args:
            path: the file.
            read_only: refuse writes.
            patience: how long to wait for commits of others; what is waited for the lock to write is taken from it.
            users: says which processes have locked the file, for messages.
        """
        super().__init__(str(path), str(path.parent), read_only=read_only, patience=patience)
        self.path = path
        self._users = users

    @cached_property
    def _writer(self) -> Engine:
        return self._new_engine()

    @cached_property
    def _reader(self) -> Engine:
        return self._writer.execution_options(icm_begin=READ)

    def _new_engine(self, *, create: bool = False) -> Engine:
        from registry.storage.engine import new_engine  # imports SQLAlchemy

        engine = new_engine(self.path, self.read_only, self.patience, create=create)
        return engine.execution_options(icm_schema=self.schema)

    def schema(self, connection: sqlite3.Connection | SqliteColumns, *, create: bool = False) -> int:
        """Return the schema of the tables, 0 if they are to be made; raise if it is none of this program."""
        (schema,) = connection.execute("PRAGMA user_version").fetchone()
        (application,) = connection.execute("PRAGMA application_id").fetchone()
        if create and schema == application == 0:
            return 0
        if application != APPLICATION_ID:
            raise NotAStore(f"{self.path} is not an icm database", path=self.path)
        self.check_schema(schema)
        return int(schema)

    @contextmanager
    def connection(self, *, write: bool = False, create: bool = False, guarded: bool = True) -> Iterator[Connection]:
        """Open a transaction without the ORM; a `write` block is committed, `create` makes the file if it is absent.

        One that is not `guarded` changes tables: it writes no checks of rows, and does not follow references.
        """
        engine = self._new_engine(create=True) if create else self._writer
        if not write:
            engine = engine.execution_options(icm_begin=READ)
        with self._errors(), engine.execution_options(icm_guarded=guarded).begin() as connection:
            yield connection

    @contextmanager
    def columns(self, *, create: bool = False) -> Iterator[SqliteColumns]:
        """Read columns in one consistent state; `create` makes the file if it is absent."""
        with self._errors(), closing(connect(self.path, self.read_only, self.patience.seconds, create)) as connection:
            connection.execute("PRAGMA cache_size=-16000")  # KB: joins come back to the same pages again and again
            begin(connection, self.patience, READ)
            yield SqliteColumns(connection)

    def damage(self) -> Iterator[Damage]:
        """Yield what is wrong with pages, indexes, references and rows."""
        with self.connection() as connection:
            for answer in connection.exec_driver_sql("PRAGMA integrity_check").scalars():
                if answer != "ok":
                    yield Damage("database", str(answer))
            if (noted := _noted_schema(connection)) not in (None, str(self.newest_schema)):
                yield Damage(
                    "database", f"its schema is {self.newest_schema}, but its table alembic_version records {noted}"
                )
            for table, rowid, parent, _ in connection.exec_driver_sql("PRAGMA foreign_key_check"):
                place = "a row" if rowid is None else f"row {rowid}"  # not every table has rowids
                yield Damage("dangling", f"{place} of {table} refers to a missing row of {parent}")
            yield from self._wrong_rows(connection)

    def _wrong_in(self, connection: Connection, table: Table, fields: Sequence[str]) -> Iterator[tuple[Any, ...]]:
        return wrong_in(connection, table, fields)

    def _translated_cause(self, error: BaseException) -> RegistryError | None:
        if not isinstance(error, sqlite3.Error):
            return None
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        fact = f"{self.path}: {error}"
        if fact.endswith(REFUSED):
            return DamagedRow(fact, path=self.path, hint=DAMAGE_HINT)
        if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            hint = "another icm process is writing; run the command again, or raise --lock-timeout"
            return StoreLocked(fact + self._users(self.path), path=self.path, hint=hint)
        if code == sqlite3.SQLITE_FULL:
            return StoreFull(fact, path=self.path, hint="run `icm prune` to free unused blobs")
        if code == sqlite3.SQLITE_CANTOPEN and self.path.exists():  # or its journal beside it cannot be opened
            hint = "check the permissions of its folder, the disk, and the limit on open files"
            return StoreIOError(fact, path=self.path, hint=hint)
        if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_ERROR):
            return DamagedStore(fact, path=self.path, hint=DAMAGE_HINT)
        if "Could not decode" in fact:  # text that is none, which Python finds, without a code
            return DamagedStore(fact, path=self.path, hint=DAMAGE_HINT)
        if code == sqlite3.SQLITE_READONLY:
            return StoreReadOnly(fact, path=self.path, hint="check the permissions of the store folder")
        if code == sqlite3.SQLITE_IOERR or "unable to serialize" in fact:  # the latter without a code
            return StoreIOError(fact, path=self.path)
        return None


class SqliteColumns:
    """The columns of a store in a file, on SQLite's own connection."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def execute(self, statement: str, values: Sequence[Value] = ()) -> sqlite3.Cursor:
        """Run a statement."""
        return self._connection.execute(statement, values)

    def stream(self, statement: str, values: Sequence[Value] = (), *, first: bool = False) -> sqlite3.Cursor:
        """Run a statement; its rows are read as they are asked for."""
        return self._connection.execute(statement, values)

    def in_any_case(self, column: str) -> str:
        """Return the column: its collation does it, and its index has that order."""
        return column

    def first_wrong(self, table: str, condition: str) -> str | None:
        """Let SQLite check the rows of a table that a condition holds for."""
        return first_wrong(self._connection, table, condition)

    def right_rows(self, table: str) -> str:
        """Return the SQL that checks a row."""
        return is_right(table)

    def are_right(self) -> bool:
        """Let SQLite check all rows, up to a wrong one."""
        return are_right(self._connection)


def connect(path: Path, read_only: bool, busy_timeout: float, create: bool) -> sqlite3.Connection:
    """Open a database as every store needs it."""
    # A reader may have to roll back the journal of a killed writer, so it opens read-only only where it must.
    mode = "rwc" if create else ("rw" if not read_only or can_be_written(path) else "ro")
    uri = f"file:{quote(str(path))}?mode={mode}"
    connection = sqlite3.connect(uri, uri=True, isolation_level=None, timeout=busy_timeout)
    try:
        for pragma in _PRAGMAS:
            connection.execute(f"PRAGMA {pragma}")
        add_functions(connection)
        if create:
            connection.execute(f"PRAGMA page_size={PAGE_SIZE}")  # an existing file keeps its own
        if read_only:
            connection.execute("PRAGMA query_only=ON")
        else:
            # Faster than DELETE, which changes the folder as well.
            connection.execute("PRAGMA journal_mode=TRUNCATE")
    except BaseException:
        connection.close()
        raise
    return connection


def can_be_written(path: Path) -> bool:
    """Say whether the file system lets this user write the database, or its folder where it is still to be made."""
    return os.access(path.parent, os.W_OK) and (os.access(path, os.W_OK) or not path.exists())


def begin(connection: sqlite3.Connection, patience: Patience, statement: str) -> None:
    """Begin a transaction, waiting for others no longer than what is left of the patience."""
    wait = min(patience.seconds, max(patience.left, _LEAST_WAIT))
    connection.execute(f"PRAGMA busy_timeout={round(1000 * wait)}")
    with patience.counted():
        connection.execute(statement)


def sqlite_of(connection: Connection) -> sqlite3.Connection:
    """Return SQLite's own connection."""
    found = connection.connection.driver_connection
    assert isinstance(found, sqlite3.Connection)
    return found


def copy_of(connection: sqlite3.Connection) -> bytes:
    """Return the bytes of a database; raise `sqlite3.Error` if some of them cannot be read.

    `serialize` alone puts zeros in place of a page that it cannot read, and says nothing.
    """
    with closing(sqlite3.connect(":memory:")) as copy:
        connection.backup(copy)
        copied = bytearray(copy.serialize())
    (version,) = connection.execute("PRAGMA schema_version").fetchone()
    copied[_SCHEMA_VERSION] = version.to_bytes(4)  # a backup counts anew
    return bytes(copied)


_SCHEMA_VERSION = slice(40, 44)
"""Where a database has it: https://sqlite.org/fileformat2.html."""


APPLICATION_ID = 0x69636D31  # "icm1": tells `file` and us what the database is


def _noted_schema(connection: Connection) -> str | None:
    """Return what alembic's table says; None if it is not there: the store was made before icm had alembic."""
    there = "SELECT 1 FROM sqlite_schema WHERE name = 'alembic_version'"
    if connection.exec_driver_sql(there).first() is None:
        return None
    noted = connection.exec_driver_sql("SELECT version_num FROM alembic_version").scalars()
    return ", ".join(map(str, noted)) or "nothing"


def migrate(database: SqliteDatabase, *, create: bool = False) -> None:
    """Bring the database to the newest schema; raise `DamagedStore` if it is old and cannot be written."""
    with database.columns(create=create) as columns:
        schema = database.schema(columns, create=create)
    if schema == database.newest_schema:
        return
    # A store that is only to be read is migrated too: no query fits an old schema.
    if not can_be_written(database.path):
        hint = "copy the store to a writable folder and run any icm command on the copy to migrate it"
        raise DamagedStore(f"{database.path} has the old schema {schema}", path=database.path, hint=hint)
    from registry.storage.migrations import make_tables, move_tables

    writer = database
    if database.read_only:
        writer = SqliteDatabase(database.path, read_only=False, patience=database.patience)
    with writer.connection(write=True, create=create, guarded=False) as connection:
        # Read again under the write lock: if many processes open an old store at once, one of them migrates it.
        schema = database.schema(sqlite_of(connection), create=create)
        if schema == 0:
            make_tables(connection)
        else:
            move_tables(connection, schema, database.place)
        connection.exec_driver_sql(f"PRAGMA application_id={APPLICATION_ID}")
        connection.exec_driver_sql(f"PRAGMA user_version={database.newest_schema}")
