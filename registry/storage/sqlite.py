"""SQLite, set up so that nothing is lost, done by half, or waited for in silence.

The rollback journal is used, not WAL: SQLite 3.7.0 to 3.51.2 can corrupt a WAL database in rare races, and icm makes
few commits. Writers begin with BEGIN IMMEDIATE, because Python's default transactions lose updates.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.pool import NullPool

from registry import files as fs
from registry.errors import (
    DamagedStore,
    NotAStore,
    RegistryError,
    StoreFull,
    StoreIOError,
    StoreLocked,
    StoreReadOnly,
)
from registry.storage.database import Database, make_tables, too_old
from registry.tables import FORMAT, REPAIR_HINT

if TYPE_CHECKING:
    from registry.storage.locks import Deadline

PAGE_SIZE = 1024  # the database of 20 tasks takes 18 KB; with pages of 4096 bytes, 45 KB
APPLICATION_ID = 0x69636D32  # "icm2": identifies the database, also for `file`
_OLD_APPLICATION_ID = 0x69636D31
_READ, _WRITE = "BEGIN", "BEGIN IMMEDIATE"
MIN_WAIT = 1.0  # seconds: a commit of another process takes a moment, and must not end a command that waited before
_PRAGMAS = (
    # A commit that was acknowledged survives power loss.
    "synchronous=FULL",
    # A database file from elsewhere may hold hostile views and triggers.
    "trusted_schema=OFF",
    "cell_size_check=ON",
    # A read error of a mapped file is a signal that kills the process, not an error.
    "mmap_size=0",
    "temp_store=MEMORY",
)


class SqliteDatabase(Database):
    """The tables of one store in a file."""

    def __init__(
        self, path: Path, *, read_only: bool, deadline: Deadline, users: Callable[[Path], str] = lambda path: ""
    ) -> None:
        """Prepare to connect; nothing is opened yet. `users` names the processes that have locked the file."""
        super().__init__(str(path), str(path.parent), read_only=read_only, deadline=deadline)
        self.path, self._users = path, users
        self._is_checked = False

    @contextmanager
    def _transaction(self, statement: str, *, create: bool = False) -> Iterator[Connection]:
        engine = _engine(self.path, self.read_only, create)
        with engine.execution_options(icm_begin=statement, icm_deadline=self.deadline).begin() as connection:
            if not create and not self._is_checked:
                (application,) = connection.exec_driver_sql("PRAGMA application_id").one()
                (number,) = connection.exec_driver_sql("PRAGMA user_version").one()
                if application == _OLD_APPLICATION_ID:
                    raise too_old(self.path.parent)
                if (application, number) != (APPLICATION_ID, FORMAT):  # although FORMAT declares this format
                    fact = f"{self.path} is not a database of icm, or its head is damaged"
                    raise DamagedStore(fact, path=self.path, hint=REPAIR_HINT)
                self._is_checked = True
            yield connection

    @contextmanager
    def _reading(self) -> Iterator[Connection]:
        with self._transaction(_READ) as connection:
            yield connection

    @contextmanager
    def _writing(self) -> Iterator[Connection]:
        with self._transaction(_WRITE) as connection:
            yield connection

    def create(self) -> None:
        """Make the file and the tables unless they are there."""
        with self._errors(), self._transaction(_WRITE, create=True) as connection:
            _make(connection)

    @contextmanager
    def rebuild(self) -> Iterator[Connection]:
        """Write a new file, and rename it over the database, which may be missing or garbage."""
        self.must_write()
        # No store counts that far, so those who look at `changes` see a new number.
        store, changes = None, int(time.time())
        try:
            meta = self.meta()
            store, changes = meta.store, meta.changes + 1
        except StoreLocked:  # another program is writing: its changes would be lost
            raise
        except RegistryError:
            pass
        journal = self.path.with_name(f"{self.path.name}-journal")
        temporary = self.path.parent / "tmp" / self.path.name
        leftovers = temporary, temporary.with_name(journal.name)
        with fs.store_errors(temporary):
            for path in leftovers:
                fs.unlink(path)
        new = SqliteDatabase(temporary, read_only=False, deadline=self.deadline)
        try:
            with new._errors(), new._transaction(_WRITE, create=True) as connection:
                _make(connection, store, changes)
                yield connection
            fs.failpoint("database-rebuilt")
            with fs.store_errors(self.path):
                # The journal first: it belongs to the old file, and SQLite would write its pages into the new one.
                fs.unlink(journal)
                fs.fsync_dir(self.path.parent)
                fs.failpoint("journal-unlinked")
                fs.replace(temporary, self.path)
                fs.fsync_dir(self.path.parent)
        finally:
            for path in leftovers:
                fs.discard(path)
        self._is_checked = False

    def damage(self) -> Iterator[str]:
        """Yield what SQLite finds wrong with pages and indexes."""
        with self.read() as connection:
            answers = connection.exec_driver_sql("PRAGMA integrity_check").scalars().all()
        yield from (str(answer) for answer in answers if answer != "ok")

    def size(self) -> int:
        """Return the length of the file."""
        return self.path.stat().st_size if self.path.exists() else 0

    def close(self) -> None:
        """Do nothing: connections are closed after each transaction."""

    def _translated_cause(self, error: BaseException) -> RegistryError | None:
        if not isinstance(error, sqlite3.Error):
            return None
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        fact = f"{self.path}: {error}"
        if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            hint = "another icm process is writing; run the command again, or raise --lock-timeout"
            return StoreLocked(fact + self._users(self.path), path=self.path, hint=hint)
        if code == sqlite3.SQLITE_FULL:
            return StoreFull(fact, path=self.path, hint="run `icm prune` to free unused blobs")
        if code == sqlite3.SQLITE_CANTOPEN and self.path.exists():  # or its journal cannot be opened
            hint = "check the permissions of its folder, the disk, and the limit on open files"
            return StoreIOError(fact, path=self.path, hint=hint)
        if code == sqlite3.SQLITE_CANTOPEN:
            return DamagedStore(f"{self.path} is missing", path=self.path, hint=REPAIR_HINT)
        if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR):
            return DamagedStore(fact, path=self.path, hint=REPAIR_HINT)
        if "Could not decode" in fact:  # text that is not UTF-8; Python reports it without a code
            return DamagedStore(fact, path=self.path, hint=REPAIR_HINT)
        if code == sqlite3.SQLITE_READONLY:
            return StoreReadOnly(fact, path=self.path, hint="check the permissions of the store folder")
        if code == sqlite3.SQLITE_IOERR:
            return StoreIOError(fact, path=self.path)
        return None


def check_links(path: Path) -> None:
    """Raise `NotAStore` if two stores share one database, as after `cp -al`: each would change the other."""
    try:
        links = path.stat().st_nlink
    except OSError:
        return
    if links > 1:
        fact = f"{path.parent} shares its database with another store: {path.name} has {links} hard links"
        raise NotAStore(fact, path=path, hint=f"make a real copy: `cp -a {path.parent} NEW`")


def _make(connection: Connection, store: str | None = None, changes: int = 0) -> None:
    make_tables(connection, store, changes=changes)
    connection.exec_driver_sql(f"PRAGMA application_id={APPLICATION_ID}")
    connection.exec_driver_sql(f"PRAGMA user_version={FORMAT}")


# An engine keeps the statements that it has compiled, which takes several times as long as running them.
@lru_cache(maxsize=16)
def _engine(path: Path, read_only: bool, create: bool) -> Engine:
    # SQLite connections must not be carried over a fork, so none is pooled.
    engine = create_engine("sqlite://", creator=partial(_connect, path, read_only, create), poolclass=NullPool)
    event.listen(engine, "begin", _begin)
    return engine


def _connect(path: Path, read_only: bool, create: bool) -> sqlite3.Connection:
    # A reader may have to roll back the journal of a killed writer, so it opens read-only only if it must.
    mode = "rwc" if create else ("rw" if not read_only or can_be_written(path) else "ro")
    connection = sqlite3.connect(f"file:{quote(str(path))}?mode={mode}", uri=True, isolation_level=None)
    try:
        for pragma in _PRAGMAS:
            connection.execute(f"PRAGMA {pragma}")
        connection.create_function("lower", 1, _lower, deterministic=True)  # SQLite's own knows ASCII letters only
        if create:
            connection.execute(f"PRAGMA page_size={PAGE_SIZE}")
        if read_only:
            connection.execute("PRAGMA query_only=ON")
        else:
            # Faster than DELETE, which changes the folder as well.
            connection.execute("PRAGMA journal_mode=TRUNCATE")
    except BaseException:
        connection.close()
        raise
    return connection


def _lower(text: str | None) -> str | None:
    return None if text is None else str(text).lower()


def can_be_written(path: Path) -> bool:
    """Return whether the file system lets this user write the database, or its folder if it does not exist."""
    return os.access(path.parent, os.W_OK) and (os.access(path, os.W_OK) or not path.exists())


def _begin(connection: Connection) -> None:
    options = connection.get_execution_options()
    deadline: Deadline = options["icm_deadline"]
    driver = connection.connection.driver_connection
    assert isinstance(driver, sqlite3.Connection)
    wait = min(deadline.seconds, max(deadline.left, MIN_WAIT))
    driver.execute(f"PRAGMA busy_timeout={round(1000 * wait)}")
    with deadline.counted():
        driver.execute(options["icm_begin"])
