"""The rows of a store in PostgreSQL.

A process has one connection that holds its locks and makes its writes: whoever has lost it has lost the locks, and
cannot commit what they protected. So it is never opened a second time. What only reads has connections of its own.

A copy of the process, made by a fork, has the same sockets: its first word, or its goodbye, would end the session of
the other one. So its ends are cut as soon as it begins, and it opens the store anew, if at all.

alembic's table says which schema the tables have; older ones are moved forward when the store is opened.

One process writes at a time, as in SQLite: a transaction that writes begins with a lock, and sees all that was
committed before it got that. So what `registry.tables` decides by what it has read stays true until it commits.
"""

from __future__ import annotations

import logging
import math
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import cached_property, partial
from itertools import count
from typing import Any
from weakref import WeakSet

import psycopg
from sqlalchemy import Connection, Engine, Table, create_engine, event, text
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError
from sqlalchemy.orm import Session
from sqlalchemy.pool import QueuePool

from registry.errors import (
    DamagedStore,
    NotAStore,
    RegistryError,
    StoreFull,
    StoreLocked,
    StoreNotFound,
    StoreReadOnly,
    StoreUnavailable,
)
from registry.names import DatabaseUrl
from registry.row_checks import COLUMNS_OF, Value
from registry.storage import postgres_place
from registry.storage.database import DAMAGE_HINT, Damage, Database
from registry.storage.locks import Patience
from registry.storage.postgres_checks import guard, install, remove, seal, what_is_wrong, with_check, wrong_in

# What they log of a connection that is lost is in the error of the store; it is for whoever asked for logs, and not
# for the terminal, to which Python writes it where nobody did.
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
    "SET tcp_keepalives_idle = 20; SET tcp_keepalives_interval = 10; SET tcp_keepalives_count = 3; "
    "SET timezone = 'UTC'; SET cursor_tuple_fraction = 1"  # for the planner: who streams rows asks for all of them
)
_SESSION = text("SELECT pg_backend_pid()")
_MOST_NAMED = 63  # bytes of a name that the server keeps
_WRITING = 0x69636D31  # the lock that a transaction holds while it writes
_LEAST_WAIT = 1.0  # seconds: a commit of another process takes a moment
_FEW = 1000  # rows that are fetched at a time
_connections = WeakSet[psycopg.Connection]()  # all of this process
_FIRST_SOON = b"SET LOCAL cursor_tuple_fraction = 0.01"  # that of its rows which somebody will ask for, for the planner
_COUNTER = count()  # cursors of a connection have different names
_FULL_HINT = "ask the database administrator to free disk space; completed work is kept"
_AWAY_HINT = "run the command again once it can be reached; only completed work is kept"


class PostgresDatabase(Database):
    """The rows of one store in a database of a server.

    Args:
        url: Its address; what that leaves out comes from PGHOST and the like, and from ~/.pgpass.
        command: What this process does, for others to see.
        read_only: Refuse writes.
        patience: How long to wait for commits of others.
    """

    first_schema = 9  # that of icm 0.10

    def __init__(self, url: DatabaseUrl, *, command: str, read_only: bool, patience: Patience) -> None:
        super().__init__(str(url), str(url), read_only=read_only, patience=patience)
        self._url = url
        self.only = only_connection(url, command)
        """What has the one connection that holds locks and writes."""
        self._reading = _engine(url, partial(new_connection, url, command), pool_size=1, max_overflow=-1)

    @cached_property
    def _writer(self) -> Engine:
        event.listen(self.only, "begin", self._begin)
        return self.only.execution_options(icm_writes=True)

    @cached_property
    def _reader(self) -> Engine:
        return self._reading.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)

    @contextmanager
    def connection(self, *, write: bool = False) -> Iterator[Connection]:
        """Open a transaction without the ORM; a `write` block is committed."""
        if write:
            self.must_write()
        with self._errors(), (self._writer if write else self._reader).begin() as connection:
            yield connection
            if write:
                seal(connection)
                postgres_place.count_change(connection)

    @contextmanager
    def columns(self) -> Iterator[PostgresColumns]:
        """Read columns in one consistent state."""
        with self.connection() as connection, ExitStack() as cursors:
            driver: Any = connection.connection.driver_connection
            yield PostgresColumns(driver, cursors)

    @contextmanager
    def changing_tables(self) -> Iterator[Connection]:
        """Open a transaction that holds the lock to write, and writes no checks of rows; leaving the block commits."""
        with self._errors(), self._writer.execution_options(icm_guarded=False).begin() as connection:
            yield connection

    @contextmanager
    def creation(self) -> Iterator[Connection]:
        """Make the tables, unless they are there, and yield the transaction of it."""
        from registry.storage.migrations import make_tables

        with self.changing_tables() as connection:
            if connection.scalar(text("SELECT to_regclass('alembic_version') IS NULL")):
                make_tables(connection)
                postgres_place.TABLE.create(connection)
                install(connection)
            else:
                self.schema(connection)
            yield connection

    def schema(self, connection: Connection) -> int:
        """Return the schema of the tables; raise if it is none that this program reads or moves forward."""
        noted = connection.scalars(text("SELECT version_num FROM alembic_version")).all()
        if len(noted) != 1 or not noted[0].isdecimal():
            fact = f"alembic_version at {self.place} has {', '.join(noted) or 'nothing'}, which is not an icm schema"
            hint = "use a separate database for the store; other programs that use alembic have a table of this name"
            raise NotAStore(fact, path=self.place, hint=hint)
        self.check_schema(int(noted[0]))
        return int(noted[0])

    def find_place(self) -> postgres_place.Place:
        """Return the number of the store and where its blobs are."""
        with self.connection() as connection:
            place = postgres_place.find(connection, self.place)
        if place is None:
            raise DamagedStore(f"{self.place} has no row in table place", path=self.place, hint=DAMAGE_HINT)
        return place

    def changes(self) -> int:
        """Return how many transactions have written to the store."""
        with self.connection() as connection:
            return postgres_place.changes(connection)

    def size(self) -> int:
        """Return the bytes of all tables with their indexes."""
        tables = [*COLUMNS_OF, postgres_place.TABLE.name, "alembic_version"]
        query = text(
            "SELECT sum(pg_total_relation_size(to_regclass(name))) FROM unnest(CAST(:tables AS text[])) AS name"
        )
        with self.connection() as connection:
            return int(connection.execute(query, {"tables": tables}).scalar_one() or 0)

    def damage(self) -> Iterator[Damage]:
        """Yield what is wrong with rows; pages, indexes and references are for the server to keep right."""
        with self.connection() as connection:
            yield from self._wrong_rows(connection)

    def _wrong_in(self, connection: Connection, table: Table, fields: Sequence[str]) -> Iterator[tuple[Any, ...]]:
        return wrong_in(connection, table, fields)

    def connect(self) -> None:
        """Open the one connection that holds locks and writes; raise `StoreUnavailable` if that cannot be."""
        with self._errors():
            self.only.connect().close()

    def shares_sessions(self) -> bool:
        """Say whether two transactions of one connection may be in two sessions, as behind PgBouncer in most modes."""
        with self._errors(), self.only.begin() as connection:
            before, driver = connection.scalar(_SESSION), connection.connection.driver_connection
            assert isinstance(driver, psycopg.Connection)
            if before == driver.info.backend_pid:
                return False  # the server itself answers
        # While another transaction goes on, a pool that shares sessions has to take another one.
        with self.connection() as other, self._errors():
            other.execute(_SESSION)
            with self.only.begin() as connection:
                return bool(connection.scalar(_SESSION) != before)

    def close(self) -> None:
        """Give up all connections, with their locks."""
        self.only.dispose()
        self._reading.dispose()

    def _begin(self, connection: Connection) -> None:
        """Wait for the lock to write; each commit of others that came before is seen from then on."""
        if not connection.get_execution_options().get("icm_writes"):
            return
        wait = min(self.patience.seconds, max(self.patience.left, _LEAST_WAIT))
        with self.patience.counted():
            limit = {"limit": f"{math.ceil(1000 * wait) or 1}ms"}
            connection.execute(text("SELECT set_config('lock_timeout', :limit, true)"), limit)
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _WRITING})
        if connection.get_execution_options().get("icm_guarded", True):
            self.schema(connection)  # a newer icm may have moved it since it was opened: it has other checks of rows
            guard(connection)

    def _seal(self, session: Session) -> None:
        session.flush()
        seal(session.connection())
        postgres_place.count_change(session.connection())

    def _translated_cause(self, error: BaseException) -> RegistryError | None:
        if not isinstance(error, psycopg.Error):
            return None
        said = error.diag.message_primary or str(error)  # without its hints, which are for whoever runs the server
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
        if state in ("XX001", "XX002"):
            return DamagedStore(fact, path=self.place, hint=DAMAGE_HINT)
        if state == "42P01":
            hint = "run `icm init --blobs s3://BUCKET/PREFIX` to create one, or set another with --store or ICM_STORE"
            return StoreNotFound(f"there is no store at {self.place}", path=self.place, hint=hint)
        if isinstance(error, psycopg.OperationalError | psycopg.InterfaceError):
            return _away(self._url, error)
        return None


class PostgresColumns:
    """The columns of a store on a server.

    Args:
        connection: One that only reads.
        cursors: Closes what the server keeps of statements whose rows were not all asked for.
    """

    def __init__(self, connection: psycopg.Connection, cursors: ExitStack) -> None:
        self._connection, self._cursors = connection, cursors

    def execute(self, statement: str, values: Sequence[Value] = ()) -> psycopg.Cursor[tuple[Any, ...]]:
        """Run a statement and fetch all it returns."""
        return self._connection.execute(_with_percents(statement), values)

    def stream(self, statement: str, values: Sequence[Value] = (), *, first: bool = False) -> Iterator[tuple[Any, ...]]:
        """Run a statement; its rows stay with the server, which sends a few at a time."""
        if first:
            self._connection.execute(_FIRST_SOON)
        cursor = self._cursors.enter_context(self._connection.cursor(f"icm_{next(_COUNTER)}"))
        cursor.itersize = _FEW
        return iter(cursor.execute(_with_percents(statement), values))

    def in_any_case(self, column: str) -> str:
        """Return what the index of the names is of: `registry.schema.in_any_case` too."""
        return f"lower({column})"

    def first_wrong(self, table: str, condition: str) -> str | None:
        """Fetch the rows of a table that a condition holds for, and check them here."""
        return next((fact for fact, _ in self._wrong(table, condition)), None)

    def right_rows(self, table: str) -> str:
        """Check all rows of a table here, and return the condition that a row is none of the wrong ones."""
        # In one consistent state, a row has its place.
        wrong = ", ".join(f"'{place}'" for _, place in self._wrong(table, "TRUE"))
        return f"{table}.ctid <> ALL (ARRAY[{wrong}]::tid[])" if wrong else "TRUE"

    def are_right(self) -> bool:
        """Fetch all rows, up to a wrong one."""
        return all(self.first_wrong(table, "TRUE") is None for table in COLUMNS_OF)

    def _wrong(self, table: str, condition: str) -> Iterator[tuple[str, str]]:
        """Yield what is wrong with each wrong row of a table, and its place."""
        query = f"SELECT {table}.ctid::text, {with_check(table, table)} FROM {table} WHERE {condition}"  # noqa: S608
        for place, *row in self.stream(query):
            fact = what_is_wrong(table, row)
            if fact is not None:
                yield fact, place


def _with_percents(statement: str) -> bytes:
    """Return a statement as psycopg reads it. It wants literals or bytes; ours are made of names of our own."""
    return statement.replace("%", "%%").replace("?", "%s").encode()


def only_connection(url: DatabaseUrl, command: str) -> Engine:
    """Return an engine with one connection for its whole life, which holds locks and writes.

    Args:
        url: Its address; what that leaves out comes from PGHOST and the like, and from ~/.pgpass.
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
    """Leave this copy of a process sockets without another end, in place of those that the process goes on using."""
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
    known = name.encode("ascii", "replace")[:_MOST_NAMED].decode()
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


def migrate(database: PostgresDatabase) -> None:
    """Bring the tables to the newest schema.

    Raises:
        StoreNotFound: There are none.
        NotAStore: They are another program's.
    """
    with database.connection() as connection:
        if database.schema(connection) == database.newest_schema:
            return
    from registry.storage.migrations import move_tables

    with database.changing_tables() as connection:
        # Read again under the lock to write: if many processes open an old store at once, one of them migrates it.
        schema = database.schema(connection)
        if schema < database.newest_schema:
            remove(connection)
            move_tables(connection, schema, database.place)
            install(connection)
