"""The schema's history: named functions that read top to bottom, and the version they lead to.

A migration and the record that it ran are one transaction. The version is read again once the write lock is held,
so that of many processes that open an old store at once exactly one migrates it. A new store begins with tables of the
third schema: to make those of the first two and drop them took as long as all else that making a store takes.
"""

from __future__ import annotations

from collections.abc import Callable

from sqlalchemy import Connection

from registry.engine import APPLICATION_ID, PAGE_SIZE, Database
from registry.errors import DamagedStore, NotAStore, StoreTooNew
from registry.migration_3 import m003_compact_rows, make_tables


def m002_evicted_and_pinned(connection: Connection) -> None:
    """Let an adapter say that its weights were deleted, and a task that they never are."""
    connection.exec_driver_sql("ALTER TABLE tasks ADD COLUMN pinned BOOLEAN DEFAULT 0 NOT NULL")
    connection.exec_driver_sql("ALTER TABLE adapters ADD COLUMN evicted_at VARCHAR")


def m004_residuals(connection: Connection) -> None:
    """Let a code have a residual beside it, and say what the two were asked to keep."""
    for column in (
        "residual_id INTEGER REFERENCES blobs",
        "residual_error DOUBLE",
        "min_gain DOUBLE",
        "max_error DOUBLE",
        "tolerance DOUBLE",
        "is_kept BOOLEAN",
    ):
        connection.exec_driver_sql(f"ALTER TABLE codes ADD COLUMN {column}")


def m005_starts(connection: Connection) -> None:
    """Let a generator know where an adapter for an unseen task starts."""
    connection.exec_driver_sql("ALTER TABLE generators ADD COLUMN start_id INTEGER REFERENCES blobs")


def m006_generated(connection: Connection) -> None:
    """Let an adapter say that nobody trained it."""
    connection.exec_driver_sql("ALTER TABLE adapters ADD COLUMN is_generated BOOLEAN DEFAULT 0 NOT NULL")


def m007_refined(connection: Connection) -> None:
    """Let a code say for how many steps it was to be refined."""
    connection.exec_driver_sql("ALTER TABLE codes ADD COLUMN refined INTEGER")


MIGRATIONS: tuple[Callable[[Connection], None], ...] = (
    m002_evicted_and_pinned,
    m003_compact_rows,
    m004_residuals,
    m005_starts,
    m006_generated,
    m007_refined,
)
"""From the first schema on; a new database begins with the third."""


def newest() -> int:
    """Return the schema that the migrations lead to."""
    return 1 + len(MIGRATIONS)


def migrate(database: Database, *, create: bool = False) -> None:
    """Bring the database to the newest schema, or check that it is there already.

    Args:
        database: an old one is moved forward even where it is only to be read: no query fits an old schema.
        create: make the database if it is absent.

    Raises:
        StoreTooNew: its schema is newer than this program; nothing was touched.
        NotAStore: it is an SQLite database of something else.
        DamagedStore: it is old and cannot be written, or no database at all.
    """
    with database.connection(create=create) as connection:
        version = _version(connection, database, create=create)
        is_compact = connection.exec_driver_sql("PRAGMA page_size").scalar_one() == PAGE_SIZE
    is_current = version == newest()
    if is_current and (is_compact or not database.can_be_written()):
        return
    if not database.can_be_written():
        hint = "copy the store to where it can be written; the first icm command there moves it forward"
        raise DamagedStore(f"{database.path} has the old schema {version}", path=database.path, hint=hint)
    writer = database
    if database.read_only:
        writer = Database(database.path, read_only=False, busy_timeout=database.busy_timeout)
    if not is_current:
        _move_forward(writer, create=create)
    if version or not is_compact:  # a database that was made just now has no gaps
        writer.compact()  # a kill before this is found by the size of the pages


def _move_forward(database: Database, *, create: bool) -> None:
    with database.connection(write=True, create=create) as connection:
        version = _version(connection, database, create=create)
        if version == 0:
            make_tables(connection)
            version = 3
        for migration in MIGRATIONS[version - 1 :]:
            migration(connection)
        connection.exec_driver_sql(f"PRAGMA application_id={APPLICATION_ID}")
        connection.exec_driver_sql(f"PRAGMA user_version={newest()}")


def _version(connection: Connection, database: Database, *, create: bool) -> int:
    version = int(connection.exec_driver_sql("PRAGMA user_version").scalar_one())
    application = int(connection.exec_driver_sql("PRAGMA application_id").scalar_one())
    if version > newest():
        hint = "use the icm that wrote it, or a newer one"
        raise StoreTooNew(f"{database.path} has schema {version}, this icm knows {newest()}", hint=hint)
    is_new = create and version == 0 and application == 0
    if application != APPLICATION_ID and not is_new:
        raise NotAStore(f"{database.path} is no icm database", path=database.path)
    return version
