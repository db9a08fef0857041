"""Schemas of a store in SQLite, and moving an older one forward."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from registry import files as fs
from registry.errors import DamagedStore, NotAStore, StoreTooNew, StoreTooOld
from registry.storage.sqlite import SqliteDatabase, can_be_written, sqlite_of

if TYPE_CHECKING:
    from sqlalchemy import Connection

APPLICATION_ID = 0x69636D31  # "icm1": tells `file` and us what the database is

_TOO_OLD_HINT = (
    "ingest the adapters again from their folders into a new store (--store). Of adapters that only this one has, the "
    "icm that wrote it makes folders with `icm materialize`"
)


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


def migrate(database: SqliteDatabase, *, create: bool = False) -> None:
    """Bring the database to the newest schema; raise `DamagedStore` if it is old and cannot be written."""
    with database.columns(create=create) as connection:
        version = _version(connection, database, create=create)
    if version == newest():
        return
    # A store that is only to be read is migrated too: no query fits an old schema.
    if not can_be_written(database.path):
        hint = "copy the store to a place that can be written; the first icm command there migrates it"
        raise DamagedStore(f"{database.path} has the old schema {version}", path=database.path, hint=hint)
    from registry.schema import Base

    writer = database
    if database.read_only:
        writer = SqliteDatabase(database.path, read_only=False, patience=database.patience)
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


def _version(connection: sqlite3.Connection, database: SqliteDatabase, *, create: bool) -> int:
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
