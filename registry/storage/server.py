"""A store whose tables are in PostgreSQL: opening it, making it, and its maintenance."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from sqlalchemy import text

from registry.errors import RegistryError, StoreUnavailable
from registry.names import DatabaseUrl
from registry.storage.blobs.place import backends_at, elsewhere
from registry.storage.database import Meta
from registry.storage.locks import Deadline
from registry.storage.locks.advisory import AdvisoryLock
from registry.storage.parts import Footprint, StoreParts
from registry.storage.postgres import PostgresDatabase

if TYPE_CHECKING:
    from registry.storage.blobs.backend import Leftover

T = TypeVar("T")

_PAUSES = (0.2, 0.4, 0.8, 1.6)
"""Seconds between the attempts to reach a server, which may be restarting."""
_FINAL, _PASSING = "FATAL", ("starting up", "shutting down", "too many clients", "not yet accepting connections")
"""Prefix of a server's permanent refusals, and English words of its temporary ones."""


def open_server(
    url: DatabaseUrl, *, read_only: bool, deadline: Deadline, command: str, blobs: str | None = None
) -> StoreParts:
    """Open the store in a database; create it if there is none and `blobs` gives the location of its bytes.

    Raises:
        StoreNotFound: There is none.
        StoreUnavailable: The database, or the place of the bytes, cannot be reached.
        NotAStore: There is one with bytes elsewhere; or the location belongs to another store.
        RegistryError: A pool is in between that breaks locks.
    """
    database = PostgresDatabase(url, command=command, read_only=read_only, deadline=deadline)
    try:
        _reach(database)
        if database.shares_sessions():
            hint = "use the address of the server itself, or a pool in session mode"
            raise RegistryError(f"{url} uses a new session for each transaction, which breaks icm's locks", hint=hint)
        meta = database.check_format() if blobs is None else _claim(database, blobs)
        backends = backends_at(str(meta.blobs), meta.store)
        if blobs is not None:
            backends[0].claim()
        lock = AdvisoryLock(database.only, meta.store, url=url, deadline=deadline)
        lock.enter()
    except BaseException:
        database.close()
        raise
    return StoreParts(lock, database, *backends, ServerMaintenance(database))


def _reach(database: PostgresDatabase) -> None:
    """Connect; after a temporary refusal, retry until the lock timeout."""
    for pause in _PAUSES:
        try:
            return database.connect()
        except StoreUnavailable as error:
            is_final = _FINAL in error.message and not any(word in error.message for word in _PASSING)
            if is_final or database.deadline.left < pause:
                raise
        with database.deadline.counted():
            time.sleep(pause)
    database.connect()


def _claim(database: PostgresDatabase, blobs: str) -> Meta:
    """Create the store unless it exists; a killed attempt resumes with its number."""
    # Checked before anything is written; if it raises, nothing is committed.
    meta = database.create(blobs, backends_at(blobs, "")[0].check_free)
    if meta.blobs != blobs:
        raise elsewhere(database.place, f"at {meta.blobs}")
    return meta


def recover_server(url: DatabaseUrl, blobs: str, *, command: str, deadline: Deadline) -> None:
    """Make the tables of a store whose database was lost, for its files at an address; `rebuild` fills them.

    Raises:
        NotAStore: The database is not lost.
        StoreUnavailable: The server cannot be reached, or there are no files of a store at the address.
    """
    owner = backends_at(blobs, "")[0].owner()
    database = PostgresDatabase(url, command=command, read_only=False, deadline=deadline)
    try:
        _reach(database)
        database.recover(blobs, owner)
    finally:
        database.close()


class ServerMaintenance:
    """The maintenance of a store in a database: its server makes backups, and room for more."""

    def __init__(self, database: PostgresDatabase) -> None:
        self._database = database

    def run(self, change: Callable[[], T]) -> T:
        """Run a change."""
        return change()

    def after_deletion(self) -> None:
        """Do nothing: there is no reserve on the disk of a server."""

    def footprint(self, blobs: Collection[str], manifests: Collection[str]) -> Footprint:
        """Return the bytes of the tables with their indexes."""
        return Footprint(self._database.size(), 0, 0)

    def leftovers(self, *, aside: bool = False) -> Iterator[Leftover]:
        """Yield nothing: killed commands leave only blobs."""
        return iter(())


class Server(NamedTuple):
    """Facts about a database server that matter to a store."""

    version: str
    has_checksums: bool  # of the pages of its files
    is_pooled: bool  # whether two transactions of one connection may be in two sessions


def examine_server(url: DatabaseUrl, command: str) -> Server:
    """Check the server of a store; raise `StoreUnavailable` if it cannot be reached."""
    database = PostgresDatabase(url, command=command, read_only=True, deadline=Deadline(0.0))
    try:
        with database.read() as connection:
            version = str(connection.scalar(text("SHOW server_version")))
            has_checksums = connection.scalar(text("SHOW data_checksums")) == "on"
        return Server(version, has_checksums, database.shares_sessions())
    finally:
        database.close()
