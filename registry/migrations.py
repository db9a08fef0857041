"""The schema's history: named functions that read top to bottom, and the version they lead to.

A migration and the record that it ran are one transaction. The version is read again once the write lock is held,
so that of many processes that open an old store at once exactly one migrates it.
"""

from __future__ import annotations

from collections.abc import Callable

from sqlalchemy import Connection

from registry.engine import APPLICATION_ID, PAGE_SIZE, Database
from registry.errors import DamagedStore, NotAStore, StoreTooNew
from registry.migration_3 import m003_compact_rows


def m001_initial(connection: Connection) -> None:
    """Make the first schema."""
    for statement in _SCHEMA_1.split(";\n"):
        connection.exec_driver_sql(statement)


_SCHEMA_1 = """
CREATE TABLE blobs (id INTEGER NOT NULL PRIMARY KEY, digest VARCHAR NOT NULL UNIQUE, size INTEGER NOT NULL);
CREATE TABLE documents (id INTEGER NOT NULL PRIMARY KEY, digest VARCHAR NOT NULL UNIQUE, body JSON NOT NULL);
CREATE TABLE base_models (
    id INTEGER NOT NULL PRIMARY KEY,
    name VARCHAR NOT NULL UNIQUE,
    fingerprint VARCHAR,
    path VARCHAR,
    shape JSON
);
CREATE TABLE tasks (
    id INTEGER NOT NULL PRIMARY KEY,
    name VARCHAR COLLATE "NOCASE" NOT NULL UNIQUE,
    base_model_id INTEGER NOT NULL REFERENCES base_models (id),
    samples_id INTEGER REFERENCES blobs (id),
    eval_id INTEGER REFERENCES blobs (id),
    created_at VARCHAR NOT NULL
);
CREATE TABLE adapters (
    id INTEGER NOT NULL PRIMARY KEY,
    task_id INTEGER NOT NULL REFERENCES tasks (id) ON DELETE CASCADE,
    step INTEGER,
    is_final BOOLEAN NOT NULL,
    weights_id INTEGER NOT NULL REFERENCES blobs (id),
    config_id INTEGER NOT NULL REFERENCES blobs (id),
    card_id INTEGER REFERENCES blobs (id),
    dtype VARCHAR NOT NULL,
    rank_max INTEGER NOT NULL,
    parameters INTEGER NOT NULL,
    target_modules JSON NOT NULL,
    layout_id INTEGER NOT NULL REFERENCES documents (id),
    source VARCHAR NOT NULL,
    created_at VARCHAR NOT NULL
);
CREATE UNIQUE INDEX one_row_per_adapter ON adapters (task_id, weights_id, config_id, coalesce(step, -1));
CREATE UNIQUE INDEX one_final_adapter ON adapters (task_id) WHERE is_final;
CREATE TABLE task_vectors (
    id INTEGER NOT NULL PRIMARY KEY,
    task_id INTEGER NOT NULL REFERENCES tasks (id) ON DELETE CASCADE,
    view VARCHAR NOT NULL,
    support_set INTEGER NOT NULL,
    extractor_id INTEGER NOT NULL REFERENCES documents (id),
    blob_id INTEGER NOT NULL REFERENCES blobs (id),
    dim INTEGER NOT NULL,
    UNIQUE (task_id, view, support_set, extractor_id)
);
CREATE TABLE generators (
    id INTEGER NOT NULL PRIMARY KEY,
    base_model_id INTEGER NOT NULL REFERENCES base_models (id),
    version INTEGER NOT NULL,
    parent_id INTEGER REFERENCES generators (id) ON DELETE SET NULL,
    blob_id INTEGER NOT NULL REFERENCES blobs (id),
    config JSON NOT NULL,
    metrics JSON NOT NULL,
    is_current BOOLEAN NOT NULL,
    created_at VARCHAR NOT NULL,
    UNIQUE (base_model_id, version)
);
CREATE UNIQUE INDEX one_current_generator ON generators (base_model_id) WHERE is_current;
CREATE TABLE train_runs (
    id INTEGER NOT NULL PRIMARY KEY,
    base_model_id INTEGER NOT NULL REFERENCES base_models (id),
    state VARCHAR NOT NULL,
    config JSON NOT NULL,
    step INTEGER NOT NULL,
    weights_id INTEGER REFERENCES blobs (id),
    optimizer_id INTEGER REFERENCES blobs (id),
    created_at VARCHAR NOT NULL,
    updated_at VARCHAR NOT NULL
);
CREATE UNIQUE INDEX one_running_train_run ON train_runs (base_model_id) WHERE state = 'running';
CREATE TABLE codes (
    id INTEGER NOT NULL PRIMARY KEY,
    task_id INTEGER NOT NULL REFERENCES tasks (id) ON DELETE CASCADE,
    generator_id INTEGER NOT NULL REFERENCES generators (id) ON DELETE CASCADE,
    adapter_id INTEGER NOT NULL REFERENCES adapters (id) ON DELETE CASCADE,
    blob_id INTEGER NOT NULL REFERENCES blobs (id),
    bits DOUBLE NOT NULL,
    dw_error DOUBLE,
    UNIQUE (task_id, generator_id)
);
CREATE TABLE evaluations (
    id INTEGER NOT NULL PRIMARY KEY,
    task_id INTEGER NOT NULL REFERENCES tasks (id) ON DELETE CASCADE,
    rung VARCHAR NOT NULL,
    generator_id INTEGER REFERENCES generators (id) ON DELETE CASCADE,
    data VARCHAR NOT NULL,
    metric VARCHAR NOT NULL,
    nats_per_token DOUBLE NOT NULL,
    tokens INTEGER NOT NULL,
    utf8_bytes INTEGER NOT NULL,
    retained_gain DOUBLE,
    dw_error DOUBLE,
    settings JSON NOT NULL,
    created_at VARCHAR NOT NULL
);
CREATE UNIQUE INDEX one_row_per_evaluation ON evaluations (task_id, rung, coalesce(generator_id, -1), data, metric)"""


def m002_evicted_and_pinned(connection: Connection) -> None:
    """Let an adapter say that its weights were deleted, and a task that they never are."""
    connection.exec_driver_sql("ALTER TABLE tasks ADD COLUMN pinned BOOLEAN DEFAULT 0 NOT NULL")
    connection.exec_driver_sql("ALTER TABLE adapters ADD COLUMN evicted_at VARCHAR")


MIGRATIONS: tuple[Callable[[Connection], None], ...] = (m001_initial, m002_evicted_and_pinned, m003_compact_rows)


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
    is_current = version == len(MIGRATIONS)
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
    writer.compact()  # a kill before this is found by the size of the pages


def _move_forward(database: Database, *, create: bool) -> None:
    with database.connection(write=True, create=create) as connection:
        version = _version(connection, database, create=create)
        for migration in MIGRATIONS[version:]:
            migration(connection)
        connection.exec_driver_sql(f"PRAGMA application_id={APPLICATION_ID}")
        connection.exec_driver_sql(f"PRAGMA user_version={len(MIGRATIONS)}")


def _version(connection: Connection, database: Database, *, create: bool) -> int:
    version = int(connection.exec_driver_sql("PRAGMA user_version").scalar_one())
    application = int(connection.exec_driver_sql("PRAGMA application_id").scalar_one())
    if version > len(MIGRATIONS):
        hint = "use the icm that wrote it, or a newer one"
        raise StoreTooNew(f"{database.path} has schema {version}, this icm knows {len(MIGRATIONS)}", hint=hint)
    is_new = create and version == 0 and application == 0
    if application != APPLICATION_ID and not is_new:
        raise NotAStore(f"{database.path} is no icm database", path=database.path)
    return version
