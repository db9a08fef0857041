"""A store whose rows are in PostgreSQL: opening it, making it, and its upkeep."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from sqlalchemy import text

from registry.errors import RegistryError, StoreUnavailable
from registry.names import DatabaseUrl
from registry.storage import postgres_place
from registry.storage.blobs.place import backend_at, elsewhere
from registry.storage.folder import Footprint, StoreParts
from registry.storage.locks import Patience
from registry.storage.locks.advisory import AdvisoryLock
from registry.storage.postgres import PostgresDatabase, migrate
from registry.storage.postgres_place import Place

if TYPE_CHECKING:
    from registry.storage.blobs.backend import Leftover
    from registry.storage.row_repair import RowRepair

T = TypeVar("T")

_PAUSES = (0.2, 0.4, 0.8, 1.6)
"""Seconds between the attempts to reach a server, which may be restarting."""
_FINAL, _PASSING = "FATAL", ("starting up", "shutting down", "too many clients", "not yet accepting connections")
"""How a server begins what it refuses for good, and what it says, mostly in English, of what is over in a moment."""


def open_server(
    url: DatabaseUrl, *, read_only: bool, patience: Patience, command: str, blobs: str | None = None
) -> StoreParts:
    """Open the store in a database; make it there if `blobs` says where its bytes are to be, and there is none.

    Raises:
        StoreNotFound: There is none.
        StoreUnavailable: The database, or the place of the bytes, cannot be reached.
        NotAStore: There is one, and its bytes are elsewhere; or the place is that of another store.
        RegistryError: A pool is in between that breaks locks.
    """
    database = PostgresDatabase(url, command=command, read_only=read_only, patience=patience)
    try:
        _reach(database)
        if database.shares_sessions():
            hint = "use the address of the server itself, or a pool in session mode"
            raise RegistryError(f"{url} uses a new session for each transaction, which breaks icm's locks", hint=hint)
        settled = None if blobs is None else _settle(database, blobs)
        migrate(database)
        place = settled or database.find_place()
        backend = backend_at(place.blobs, place.number)
        if blobs is not None:
            backend.claim()
        lock = AdvisoryLock(database.only, place.number, url=url, patience=patience)
        lock.enter()
    except BaseException:
        database.close()
        raise
    return StoreParts(lock, database, backend, ServerUpkeep(database))


def _reach(database: PostgresDatabase) -> None:
    """Connect; where that may succeed in a moment, try again as long as somebody who waits for locks would wait."""
    for pause in _PAUSES:
        try:
            return database.connect()
        except StoreUnavailable as error:
            is_final = _FINAL in error.message and not any(word in error.message for word in _PASSING)
            if is_final or database.patience.left < pause:
                raise
        with database.patience.counted():
            time.sleep(pause)
    database.connect()


def _settle(database: PostgresDatabase, blobs: str) -> Place:
    """Make the store unless it is there; a killed attempt goes on with its number."""
    backend = backend_at(blobs, "")  # before anything is written
    with database.creation() as connection:
        place = postgres_place.find(connection, database.place)
        if place is None:
            backend.check_free()  # otherwise nothing is committed
            place = postgres_place.add(connection, blobs)
    if place.blobs != blobs:
        raise elsewhere(database.place, f"at {place.blobs}")
    return place


class ServerUpkeep:
    """The upkeep of a store in a database: its server makes copies of rows, and room for more."""

    def __init__(self, database: PostgresDatabase) -> None:
        self._database = database

    def before_deletion(self) -> None:
        """Check all rows."""
        self._database.must_be_sound()

    def run(self, change: Callable[[], T]) -> T:
        """Run a change of rows."""
        return change()

    def after_deletion(self) -> None:
        """Do nothing: there is no reserve on the disk of a server."""

    def footprint(self, listed: Collection[str]) -> Footprint:
        """Return the bytes of the tables with their indexes; a server has others that are nobody's."""
        return Footprint(self._database.size(), 0, 0)

    def leftovers(self, *, aside: bool = False) -> Iterator[Leftover]:
        """Yield nothing: killed commands leave only blobs."""
        return iter(())

    def repair_rows(self) -> list[RowRepair]:
        """Raise if a row is wrong: the server's own copies have the right one."""
        if self._database.is_sound():
            return []
        hint = "run `icm verify` to list the damaged rows, then restore them from a backup of the database"
        raise RegistryError(
            f"{self._database.place} has damaged rows, and icm cannot repair rows in PostgreSQL", hint=hint
        )


class Server(NamedTuple):
    """A database server, as far as it matters to a store."""

    version: str
    has_checksums: bool  # of the pages of its files
    is_pooled: bool  # whether two transactions of one connection may be in two sessions


def examine_server(url: DatabaseUrl, command: str) -> Server:
    """Check the server of a store; raise `StoreUnavailable` if it cannot be reached."""
    database = PostgresDatabase(url, command=command, read_only=True, patience=Patience(0.0))
    try:
        with database.connection() as connection:
            version = str(connection.scalar(text("SHOW server_version")))
            has_checksums = connection.scalar(text("SHOW data_checksums")) == "on"
        return Server(version, has_checksums, database.shares_sessions())
    finally:
        database.close()
