"""SQLAlchemy on the connections of `registry.storage.sqlite`: for whoever writes, and reads whole objects.

Importing it takes longer than most short commands, so the database imports this module when it is asked for the first
time.
"""

from __future__ import annotations

from functools import lru_cache, partial
from pathlib import Path

from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.pool import NullPool

from registry.row_checks import guard
from registry.schema import Base
from registry.storage.locks import Patience
from registry.storage.sqlite import WRITE, begin, connect, sqlite_of


def new_engine(path: Path, read_only: bool, patience: Patience, *, create: bool = False) -> Engine:
    """Return what connects to a database; `create` makes the file if it is absent."""
    engine = _engine(path, read_only, patience.seconds, create=create)
    return engine.execution_options(icm_patience=patience)


# An engine keeps the statements that it has compiled, which takes several times as long as running them: a server opens
# its store for each task.
@lru_cache(maxsize=16)
def _engine(path: Path, read_only: bool, busy_timeout: float, *, create: bool = False) -> Engine:
    engine = create_engine(
        "sqlite://",
        creator=partial(connect, path, read_only, busy_timeout, create),
        # SQLite connections must not be carried over a fork, so none is pooled.
        poolclass=NullPool,
    )
    event.listen(engine, "begin", _begin)
    return engine


def _begin(connection: Connection) -> None:
    options = connection.get_execution_options()
    statement, is_guarded = options.get("icm_begin", WRITE), options.get("icm_guarded", True)
    if not is_guarded:
        connection.exec_driver_sql("PRAGMA foreign_keys=OFF")  # a transaction cannot change that
    begin(sqlite_of(connection), options["icm_patience"], statement)
    if statement == WRITE and is_guarded:
        options["icm_schema"](sqlite_of(connection))  # a newer icm may have moved it: it has other checks of rows
        guard(sqlite_of(connection), Base.metadata)
