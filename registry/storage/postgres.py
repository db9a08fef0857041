"""The tables of a store in PostgreSQL.

A process has one connection that holds its locks and makes its writes: a process that has lost it has lost the locks,
and cannot commit protected changes. So it is never opened a second time. Reads have connections of their own.

A copy of the process, made by a fork, has the same sockets: its first word, or its goodbye, would end the session of
the other one. So its ends are cut as soon as it begins, and it opens the store again, if at all.

One process writes at a time, as in SQLite: a transaction that writes begins with a lock, and sees every earlier commit.
"""

from __future__ import annotations

import logging
import math
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any
from weakref import WeakSet

import psycopg
from sqlalchemy import Connection, Engine, create_engine, delete, event, inspect, select, text
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError
from sqlalchemy.pool import QueuePool

from registry.errors import (
    DamagedStore,
    NotAStore,
    RegistryError,
    StoreFull,
    StoreLocked,
    StoreNotFound,
    StoreReadOnly,
    StoreTooNew,
    StoreUnavailable,
)
from registry.names import DatabaseUrl
from registry.storage.database import Database, Meta, make_tables, too_old
from registry.storage.locks import Deadline
from registry.tables import FORMAT, HISTORY, META, METADATA, REFS, REPAIR_HINT

# The store's error already reports a lost connection; the drivers' logs are for applications that configure logging,
# not for the terminal, where Python would print them otherwise.
for _talker in ("psycopg", "sqlalchemy"):
    logging.getLogger(_talker).addHandler(logging.NullHandler())

_CONNECTING = 10  # seconds
# A peer that is gone is noticed within a minute, on this side as by the server, which then gives its locks away.
_ALIVE: dict[str, Any] = {
    "keepalives_idle": 20,
    "keepalives_interval": 10,
    "keepalives_count": 3,
    "tcp_user_timeout": 60_000,
}
# Set after connecting: PgBouncer refuses a connection that begins with settings which it does not know.
_OF_SESSION = (
    "SET tcp_keepalives_idle = 20; SET tcp_keepalives_interval = 10; SET tcp_keepalives_count = 3; SET timezone = 'UTC'"
)
_SESSION = text("SELECT pg_backend_pid()")
_MAX_NAME_BYTES = 63  # that the server keeps
MIN_WAIT = 1.0  # seconds: a commit of another process takes a moment
_WRITING = 0x69636D31  # the lock that a transaction holds while it writes
_connections = WeakSet[psycopg.Connection]()  # all of this process
_NO_STORE_HINT = "run `icm init --blobs s3://BUCKET/PREFIX` to create one, or set another with --store or ICM_STORE"
_FULL_HINT = "ask the database administrator to free disk space; completed work is kept"
_AWAY_HINT = "run the command again once it can be reached; only completed work is kept"


class PostgresDatabase(Database):
    """The tables of one store in a database of a server.

    Args:
        url: Its address; missing parts come from PGHOST and similar variables, and from ~/.pgpass.
        command: What this process does, for others to see.
        read_only: Refuse writes.
        deadline: How long to wait for commits of others.
    """

    # The location of the manifests is lost with it.
    meta_hint = "run `icm init STORE --blobs LOCATION --recover` with the location of its files"

    def __init__(self, url: DatabaseUrl, *, command: str, read_only: bool, deadline: Deadline) -> None:
        super().__init__(str(url), str(url), read_only=read_only, deadline=deadline)
        self._url = url
        self.only = only_connection(url, command)
        """Owner of the one connection that holds locks and writes."""
        self._readers = _engine(url, partial(new_connection, url, command), pool_size=1, max_overflow=-1)

    @contextmanager
    def _reading(self) -> Iterator[Connection]:
        engine = self._readers.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
        with engine.begin() as connection:
            yield connection

    @contextmanager
    def _writing(self) -> Iterator[Connection]:
        """Wait for the lock to write; each earlier commit of others is seen from then on."""
        with self.only.begin() as connection:
            wait = min(self.deadline.seconds, max(self.deadline.left, MIN_WAIT))
            with self.deadline.counted():
                limit = {"limit": f"{math.ceil(1000 * wait) or 1}ms"}
                connection.execute(text("SELECT set_config('lock_timeout', :limit, true)"), limit)
                connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _WRITING})
            yield connection

    def create(self, blobs: str, before: Callable[[], None] = lambda: None) -> Meta:
        """Make the tables of a store with its bytes at an address, unless there is one; `before` that, run a check."""
        with self._errors(), self._writing() as connection:
            if not self._is_created(connection):
                before()
                make_tables(connection, blobs=blobs)
            return self._meta(connection)

    def recover(self, blobs: str, store: str) -> None:
        """Make the tables of a store whose database was lost, for its files at an address."""
        with self._errors(), self._writing() as connection:
            if self._is_created(connection) and connection.execute(select(META)).first() is not None:
                hint = "run `icm verify --repair` to rebuild its database"
                raise NotAStore(f"{self.place} is a store already", path=self.place, hint=hint)
            make_tables(connection, store=store, blobs=blobs)

    @contextmanager
    def rebuild(self) -> Iterator[Connection]:
        """Delete the rows of refs and history, and write new ones, in one transaction."""
        with self.write() as connection:
            METADATA.create_all(connection)
            for table in (REFS, HISTORY):
                connection.execute(delete(table))
            yield connection

    def check_format(self) -> Meta:
        """Return the row of META; raise if this is not a store, or one of another format."""
        with self.read() as connection:
            if not self._is_created(connection):
                raise StoreNotFound(f"there is no store at {self.place}", path=self.place, hint=_NO_STORE_HINT)
            return self._meta(connection)

    def _is_created(self, connection: Connection) -> bool:
        """Return whether there is a store; raise if it is one of another format."""
        known = inspect(connection)
        if known.has_table(META.name):
            for number in connection.scalars(select(META.c.format)):
                if number != FORMAT:
                    fact = f"{self.place} has format {number}, and this icm reads format {FORMAT}"
                    hint = "use the icm version that wrote it, or a newer one"
                    raise StoreTooNew(fact, path=self.place, hint=hint)
            return True
        if known.has_table("alembic_version") and known.has_table("task_vectors"):
            raise too_old(self.place)
        return False

    def damage(self) -> Iterator[str]:
        """Yield nothing: the server checks its pages."""
        return iter(())

    def size(self) -> int:
        """Return the bytes of all tables with their indexes."""
        names = list(METADATA.tables)
        query = text(
            "SELECT sum(pg_total_relation_size(to_regclass(name))) FROM unnest(CAST(:tables AS text[])) AS name"
        )
        with self.read() as connection:
            return int(connection.execute(query, {"tables": names}).scalar_one() or 0)

    def connect(self) -> None:
        """Open the one connection that holds locks and writes; raise `StoreUnavailable` if that cannot be."""
        with self._errors():
            self.only.connect().close()

    def shares_sessions(self) -> bool:
        """Return whether two transactions of a connection may be in two sessions, as behind most PgBouncers."""
        with self._errors(), self.only.begin() as connection:
            before, driver = connection.scalar(_SESSION), connection.connection.driver_connection
            assert isinstance(driver, psycopg.Connection)
            if before == driver.info.backend_pid:
                return False  # the server itself answers
        # While another transaction is open, a pool that shares sessions must use another session.
        with self.read() as other, self._errors():
            other.execute(_SESSION)
            with self.only.begin() as connection:
                return bool(connection.scalar(_SESSION) != before)

    def close(self) -> None:
        """Release all connections, with their locks."""
        self.only.dispose()
        self._readers.dispose()

    def _translated_cause(self, error: BaseException) -> RegistryError | None:
        if not isinstance(error, psycopg.Error):
            return None
        said = error.diag.message_primary or str(error)  # without its hints, which are for the server's administrator
        state, fact = error.sqlstate or "", f"{self.place}: {' '.join(said.split())[:300]}"
        if state == "55P03":
            hint = "another icm process is writing; run the command again, or raise --lock-timeout"
            return StoreLocked(f"{self.place} is being written", path=self.place, hint=hint)
        if state == "53100":
            return StoreFull(fact, path=self.place, hint=_FULL_HINT)
        if state in ("42501", "25006"):
            return StoreReadOnly(
                fact, path=self.place, hint="ask the database administrator for write access to the store's tables"
            )
        if state in ("XX001", "XX002", "42P01", "42703"):  # damaged pages, or a table or column that is gone
            return DamagedStore(fact, path=self.place, hint=REPAIR_HINT)
        if isinstance(error, psycopg.OperationalError | psycopg.InterfaceError):
            return _away(self._url, error)
        return None


def only_connection(url: DatabaseUrl, command: str) -> Engine:
    """Return an engine with one connection for its whole life, which holds locks and writes.

    Args:
        url: Its address; missing parts come from PGHOST and similar variables, and from ~/.pgpass.
        command: What this process does, for others to see.
    """
    opened: list[psycopg.Connection] = []

    def connect() -> psycopg.Connection:
        if opened:
            fact = f"lost the connection to {url} and its locks"
            raise StoreUnavailable(fact, path=str(url), hint="run the same command again; completed work is kept")
        opened.append(new_connection(url, command))
        return opened[0]

    # A second transaction at the same time would share the first one's commit, so there is an error instead.
    one: Any = {"poolclass": QueuePool, "pool_size": 1, "max_overflow": 0, "pool_timeout": 0}
    return _engine(url, connect, **one)


def _engine(url: DatabaseUrl, connect: Callable[[], psycopg.Connection], **pool: Any) -> Engine:
    """Return an engine that refuses to work in a copy of this process."""
    owner = os.getpid()

    def check(*_: object) -> None:
        if os.getpid() != owner:
            fact = f"{url} was opened before this process was forked"
            raise StoreUnavailable(fact, path=str(url), hint="open the store in each process after the fork")

    def checked() -> psycopg.Connection:
        check()
        return connect()

    # No column has the type for which it would ask the server three times.
    engine = create_engine("postgresql+psycopg://", creator=checked, use_native_hstore=False, **pool)
    event.listen(engine, "checkout", check)
    return engine


def _cut_all() -> None:
    """Replace the sockets in this forked copy by unconnected ones; the parent process keeps using the originals."""
    for connection in list(_connections):
        with suppress(psycopg.Error):  # it is closed
            place = connection.fileno()
            ours, other = socket.socketpair()
            with ours, other:
                os.dup2(ours.fileno(), place, inheritable=False)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_cut_all)


def new_connection(url: DatabaseUrl, command: str) -> psycopg.Connection:
    """Connect to a database.

    Raises:
        StoreUnavailable: It cannot be reached, or refuses.
    """
    name = f"{' '.join(command.split())[:40]} on {socket.gethostname()}"
    known = name.encode("ascii", "replace")[:_MAX_NAME_BYTES].decode()
    options: Any = {"application_name": known, "connect_timeout": _CONNECTING, **_ALIVE}
    try:
        connection = psycopg.connect(url.secret, autocommit=True, **options)
        connection.execute(_OF_SESSION)
        connection.autocommit = False
    except psycopg.Error as error:
        raise _away(url, error) from None
    _connections.add(connection)
    return connection


@contextmanager
def connection_errors(url: DatabaseUrl) -> Iterator[None]:
    """Turn the error of a lost connection into one of the store."""
    try:
        yield
    except DBAPIError as error:
        if not (error.connection_invalidated or isinstance(error, InterfaceError | OperationalError)):
            raise
        raise _away(url, error.orig or error) from None


def _away(url: DatabaseUrl, error: BaseException) -> RegistryError:
    fact = " ".join(str(error).split())[:300]
    return StoreUnavailable(f"{url}: {fact}", path=str(url), hint=_AWAY_HINT)
