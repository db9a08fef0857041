"""SQLite, set up so that nothing is lost, done by half, or waited for in silence.

The rollback journal is used, not WAL: SQLite 3.7.0 to 3.51.2 can corrupt a WAL database in rare races, and icm makes
few commits. Writers begin with BEGIN IMMEDIATE, because Python's default transactions lose updates: a transaction
that reads first and writes later would work from values that another one has replaced.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from urllib.parse import quote

from registry import files as fs
from registry.errors import (
    DamagedRow,
    DamagedStore,
    NotAStore,
    RegistryError,
    StoreFull,
    StoreIOError,
    StoreLocked,
    StoreReadOnly,
    StoreTooNew,
    StoreTooOld,
)
from registry.row_checks import REFUSED, WrongRow, add_functions, find_wrong_rows
from registry.values import UnreadableValue

if TYPE_CHECKING:
    from sqlalchemy import Connection, Engine
    from sqlalchemy.orm import Session

    from registry.storage.locks.waiting import Patience

APPLICATION_ID = 0x69636D31  # "icm1": tells `file` and us what the database is

_DAMAGE_HINT = "`icm verify` says what is damaged, and what mends it"
_TOO_OLD_HINT = (
    "ingest the adapters again from their folders into a new store (--store). Of adapters that only this one has, the "
    "icm that wrote it makes folders with `icm materialize`"
)
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


@dataclass(frozen=True)
class Damage:
    """Something that is wrong with the database."""

    kind: Literal["database", "dangling", "row"]
    fact: str
    task: str | None = None  # that it is about, as far as it tells


class Database:
    """The rows of one store."""

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
        self.path = path
        self.read_only = read_only
        self.patience = patience
        self._users = users
        self._is_sound = False  # as far as anybody has looked
        self.is_kept = False  # whether a copy was made since: see `registry.storage.kept`

    @cached_property
    def _engine(self) -> Engine:
        return self._new_engine()

    @cached_property
    def _reader(self) -> Engine:
        return self._engine.execution_options(icm_begin=READ)

    def _new_engine(self, *, create: bool = False) -> Engine:
        from registry.storage.engine import new_engine  # imports SQLAlchemy

        return new_engine(self.path, self.read_only, self.patience, create=create)

    def must_write(self) -> None:
        """Raise `StoreReadOnly` if the store was opened read-only."""
        if self.read_only:
            raise StoreReadOnly(f"the store {self.path.parent} was opened read-only", path=self.path.parent)

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
        with self._errors(), Session(self._engine, autoflush=False, expire_on_commit=False) as session, session.begin():
            yield session

    @contextmanager
    def connection(self, *, write: bool = False, create: bool = False, guarded: bool = True) -> Iterator[Connection]:
        """Open a transaction without the ORM; a `write` block is committed, `create` makes the file if it is absent.

        One that is not `guarded` changes tables: it writes no checks of rows, and does not follow references.
        """
        engine = self._new_engine(create=True) if create else self._engine
        if not write:
            engine = engine.execution_options(icm_begin=READ)
        with self._errors(), engine.execution_options(icm_guarded=guarded).begin() as connection:
            yield connection

    @contextmanager
    def columns(self, *, create: bool = False) -> Iterator[sqlite3.Connection]:
        """Open SQLite's own connection to read columns in one consistent state; it checks no row by itself."""
        with self._errors(), closing(connect(self.path, self.read_only, self.patience.seconds, create)) as connection:
            connection.execute("PRAGMA cache_size=-16000")  # KB: joins come back to the same pages again and again
            begin(connection, self.patience, READ)
            yield connection

    def damage(self) -> Iterator[Damage]:
        """Yield what is wrong with pages, indexes, references and rows."""
        from registry.schema import Base

        with self.connection() as connection:
            for answer in connection.exec_driver_sql("PRAGMA integrity_check").scalars():
                if answer != "ok":
                    yield Damage("database", str(answer))
            for table, rowid, parent, _ in connection.exec_driver_sql("PRAGMA foreign_key_check"):
                place = "a row" if rowid is None else f"row {rowid}"  # not every table has rowids
                yield Damage("dangling", f"{place} of {table} refers to a row of {parent} that is gone")
            for fact, task in find_wrong_rows(connection, Base.metadata):
                yield Damage("row", fact, task)

    def must_be_sound(self) -> None:
        """Raise if anything is wrong with any row: what may be deleted follows from all of them. Looks once."""
        if not self._is_sound:
            for found in self.damage():
                fact = f"{self.path}: {found.fact}; while that is so, icm deletes nothing"
                raise DamagedRow(fact, path=self.path, hint=_DAMAGE_HINT)
            self._is_sound = True

    def is_sound(self) -> bool:
        """Say whether nothing is wrong with any row; the first call looks."""
        try:
            self.must_be_sound()
        except DamagedStore:
            return False
        return True

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            translated = self._translated(error)
            if translated is None:  # a broken rule of the schema is a bug of ours
                raise
            raise translated from error

    def damaged_row(self, fact: str) -> DamagedRow:
        """Return the error that says what is wrong with a row."""
        return DamagedRow(f"{self.path}: {fact}", path=self.path, hint=_DAMAGE_HINT)

    def _translated(self, error: Exception) -> RegistryError | None:
        from sqlalchemy.exc import DBAPIError, NoResultFound  # slow, but something went wrong

        if isinstance(error, WrongRow):
            return self.damaged_row(str(error))
        if isinstance(error, (UnicodeDecodeError, UnreadableValue, NoResultFound)):
            return DamagedStore(f"{self.path}: {error}", path=self.path, hint=_DAMAGE_HINT)
        cause = error.orig if isinstance(error, DBAPIError) else error
        return self._translated_sqlite(cause) if isinstance(cause, sqlite3.Error) else None

    def _translated_sqlite(self, error: sqlite3.Error) -> RegistryError | None:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        fact = f"{self.path}: {error}"
        if fact.endswith(REFUSED):
            return DamagedRow(fact, path=self.path, hint=_DAMAGE_HINT)
        if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            hint = "another icm is writing; try again or wait longer with --lock-timeout"
            return StoreLocked(fact + self._users(self.path), path=self.path, hint=hint)
        if code == sqlite3.SQLITE_FULL:
            return StoreFull(fact, path=self.path, hint="`icm prune` frees what no row refers to")
        if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_ERROR):
            return DamagedStore(fact, path=self.path, hint=_DAMAGE_HINT)
        if "Could not decode" in fact:  # text that is none, which Python finds, without a code
            return DamagedStore(fact, path=self.path, hint=_DAMAGE_HINT)
        if code == sqlite3.SQLITE_READONLY:
            return StoreReadOnly(fact, path=self.path, hint="check the permissions of the store folder")
        if code == sqlite3.SQLITE_IOERR:
            return StoreIOError(fact, path=self.path)
        return None


def connect(path: Path, read_only: bool, busy_timeout: float, create: bool) -> sqlite3.Connection:
    """Open a database as every store needs it."""
    # A reader may have to roll back the journal of a killed writer, so it opens read-only only where it must.
    mode = "rwc" if create else ("rw" if not read_only or _can_be_written(path) else "ro")
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


def _can_be_written(path: Path) -> bool:
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


def _with_new_formats(connection: Connection) -> None:
    """Move to schema 9: generators, codes, residuals and task vectors are written in other formats from here on.

    No table changes: the number keeps an earlier icm from a store whose codes it would call damaged. Generators and
    codes stay, for that icm to read: see `icmlora.fleet.older`. Vectors are made again.
    """
    if connection.exec_driver_sql("SELECT 1 FROM codes LIMIT 1").first() is not None:
        _keep_for_earlier_icm(connection)
    connection.exec_driver_sql("DELETE FROM task_vectors")


def _keep_for_earlier_icm(connection: Connection) -> None:
    """Keep the database as it is, next to it. Nothing here reads that file, and nothing deletes it."""
    version = connection.exec_driver_sql("PRAGMA user_version").scalar_one()
    path = Path(connection.exec_driver_sql("PRAGMA database_list").all()[0][2])
    kept = path.with_name(f"{path.name}.schema-{version}")
    temporary = kept.with_name(f"{kept.name}.tmp")
    with fs.store_errors(kept):
        fs.discard(temporary)
        fs.write_file(temporary, sqlite_of(connection).serialize(), 0o600)
        fs.replace(temporary, kept)
        fs.fsync_dir(kept.parent)


FIRST_SCHEMA = 8
MIGRATIONS: tuple[Callable[[Connection], None], ...] = (_with_new_formats,)
"""One function for each schema after the first: it gets a connection with the write lock and changes the tables."""


def newest() -> int:
    """Return the schema that this program reads and writes."""
    return FIRST_SCHEMA + len(MIGRATIONS)


def migrate(database: Database, *, create: bool = False) -> None:
    """Bring the database to the newest schema; raise `DamagedStore` if it is old and cannot be written."""
    with database.columns(create=create) as connection:
        version = _version(connection, database, create=create)
    if version == newest():
        return
    # A store that is only to be read is migrated too: no query fits an old schema.
    if not _can_be_written(database.path):
        hint = "copy the store to a place that can be written; the first icm command there migrates it"
        raise DamagedStore(f"{database.path} has the old schema {version}", path=database.path, hint=hint)
    from registry.schema import Base

    writer = database
    if database.read_only:
        writer = Database(database.path, read_only=False, patience=database.patience)
    with writer.connection(write=True, create=create, guarded=False) as connection:
        # Read again under the write lock: if many processes open an old store at once, one of them migrates it.
        version = _version(sqlite_of(connection), database, create=create)
        if version == 0:
            Base.metadata.create_all(connection)
        else:
            for migration in MIGRATIONS[version - FIRST_SCHEMA :]:
                migration(connection)
        connection.exec_driver_sql(f"PRAGMA application_id={APPLICATION_ID}")
        connection.exec_driver_sql(f"PRAGMA user_version={newest()}")


def _version(connection: sqlite3.Connection, database: Database, *, create: bool) -> int:
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    if version > newest():
        hint = "use the icm that wrote it, or a newer one"
        raise StoreTooNew(f"{database.path} has schema {version}, this icm knows {newest()}", hint=hint)
    is_new = create and version == 0 and application == 0
    if application != APPLICATION_ID and not is_new:
        raise NotAStore(f"{database.path} is not an icm database", path=database.path)
    if 0 < version < FIRST_SCHEMA:
        fact = f"{database.path} has schema {version}; this icm begins with schema {FIRST_SCHEMA}"
        raise StoreTooOld(fact, path=database.path, hint=_TOO_OLD_HINT)
    return int(version)
