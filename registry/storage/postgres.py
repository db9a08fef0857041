"""Connections to PostgreSQL, and what is told where there is none.

A process has one connection that holds its locks and makes its writes: whoever has lost it has lost the locks, and
cannot commit what they protected. So it is never opened a second time.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
from sqlalchemy import Engine, create_engine
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError
from sqlalchemy.pool import QueuePool

from registry.errors import RegistryError, StoreAway

_CONNECTING = 10  # seconds
# A peer that is gone is noticed within a minute, on this side as by the server, which then gives its locks away.
_ALIVE = {"keepalives_idle": 20, "keepalives_interval": 10, "keepalives_count": 3, "tcp_user_timeout": 60_000}
_OF_SESSION = "-c tcp_keepalives_idle=20 -c tcp_keepalives_interval=10 -c tcp_keepalives_count=3 -c timezone=UTC"
_MOST_NAMED = 63  # bytes of a name that the server keeps
_PASSWORD = re.compile(r"(?<=://)([^/?#@]*@)|(?<=[?&])(password|sslpassword)=[^&#]*")
_AWAY_HINT = "try again when it can be reached; nothing that was not acknowledged is kept"


def masked(url: str) -> str:
    """Return the address of a database as it may be shown: without a user and a password."""
    return _PASSWORD.sub("", url)


def only_connection(url: str, command: str) -> Engine:
    """Return an engine with one connection for its whole life, which holds locks and writes.

    Args:
        url: A `postgresql://` address; what it leaves out comes from PGHOST and the like, and from ~/.pgpass.
        command: What this process does, for others to see.
    """
    opened: list[psycopg.Connection] = []

    def connect() -> psycopg.Connection:
        if opened:
            fact = f"the connection to {masked(url)} was lost, and the locks with it"
            raise StoreAway(fact, path=masked(url), hint="run the same command again; what was acknowledged is kept")
        opened.append(new_connection(url, command))
        return opened[0]

    # A second transaction at the same time would share the first one's commit, so there is an error instead.
    one: Any = {"poolclass": QueuePool, "pool_size": 1, "max_overflow": 0, "pool_timeout": 0}
    return create_engine("postgresql+psycopg://", creator=connect, **one)


def new_connection(url: str, command: str) -> psycopg.Connection:
    """Connect to a database.

    Raises:
        StoreAway: It cannot be reached, or refuses.
    """
    name = f"{' '.join(command.split())[:40]} on {socket.gethostname()}"
    known = name.encode("ascii", "replace")[:_MOST_NAMED].decode()
    try:
        return psycopg.connect(url, application_name=known, connect_timeout=_CONNECTING, options=_OF_SESSION, **_ALIVE)
    except psycopg.Error as error:
        raise _away(url, error) from None


@contextmanager
def connection_errors(url: str) -> Iterator[None]:
    """Turn the error of a lost connection into one of the store."""
    try:
        yield
    except DBAPIError as error:
        if not (error.connection_invalidated or isinstance(error, InterfaceError | OperationalError)):
            raise
        raise _away(url, error.orig or error) from None


def _away(url: str, error: BaseException) -> RegistryError:
    fact = " ".join(str(error).split())[:300]
    return StoreAway(f"{masked(url)}: {fact}", path=masked(url), hint=_AWAY_HINT)
