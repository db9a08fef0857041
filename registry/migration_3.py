"""The third schema: the same facts in a quarter of the bytes (see :mod:`registry.columns`).

    old tables are renamed ──▶ new ones are made ──▶ INSERT ... SELECT, parents first ──▶ old ones go, children first

Digests are bytes, times are numbers, JSON is deflated. What many rows repeat stands once: what adapters have in common,
how evaluations were made, the folder of a task.
"""

from __future__ import annotations

import hashlib
import sqlite3
from typing import cast

from sqlalchemy import Connection

from registry.columns import pack_text
from registry.folders import task_folder, unusual_source

_TABLES = (
    *("evaluations", "codes", "task_vectors", "train_runs", "generators", "adapters", "tasks"),
    *("base_models", "documents", "blobs"),
)
_INDEXES = (
    *("one_row_per_adapter", "one_final_adapter", "one_current_generator", "one_running_train_run"),
    "one_row_per_evaluation",
)


def m003_compact_rows(connection: Connection) -> None:
    """Write every row anew, in columns that take less."""
    _define_functions(cast(sqlite3.Connection, connection.connection.driver_connection))
    for index in _INDEXES:
        connection.exec_driver_sql(f"DROP INDEX {index}")
    for table in _TABLES:
        connection.exec_driver_sql(f"ALTER TABLE {table} RENAME TO old_{table}")
    make_tables(connection)
    for statement in _COPY.split(";"):
        connection.exec_driver_sql(statement)
    for table in _TABLES:
        connection.exec_driver_sql(f"DROP TABLE old_{table}")


def make_tables(connection: Connection) -> None:
    """Make the tables and indexes of this schema, in a database that has none of these names."""
    for statement in _SCHEMA.split(";"):
        connection.exec_driver_sql(" ".join(statement.split()))  # SQLite keeps the text of a table as it is given


def _define_functions(connection: sqlite3.Connection) -> None:
    """Let this connection's SQL call what turns old values into new ones; NULL stays NULL."""

    def kept_source(source: str, folder: str, step: int | None, is_final: int) -> str | None:
        return unusual_source(source, folder, step, is_final=bool(is_final))

    connection.create_function("icm_digest", 1, lambda text: text and bytes.fromhex(text))
    connection.create_function("icm_pack", 1, lambda text: text and pack_text(text))
    connection.create_function("icm_hash", 1, lambda text: hashlib.sha256(text.encode()).digest())
    connection.create_function("icm_folder", 1, task_folder)
    connection.create_function("icm_source", 4, kept_source)


_SCHEMA = """
CREATE TABLE blobs (id INTEGER NOT NULL PRIMARY KEY, digest BLOB NOT NULL UNIQUE, size INTEGER NOT NULL);
CREATE TABLE documents (id INTEGER NOT NULL PRIMARY KEY, digest BLOB NOT NULL UNIQUE, body BLOB NOT NULL);
CREATE TABLE base_models (
    id INTEGER NOT NULL PRIMARY KEY,
    name VARCHAR NOT NULL UNIQUE,
    fingerprint VARCHAR,
    path VARCHAR,
    shape BLOB
);
CREATE TABLE tasks (
    id INTEGER NOT NULL PRIMARY KEY,
    name VARCHAR COLLATE NOCASE NOT NULL UNIQUE,
    base_model_id INTEGER NOT NULL REFERENCES base_models,
    samples_id INTEGER REFERENCES blobs,
    eval_id INTEGER REFERENCES blobs,
    created_at INTEGER NOT NULL,
    pinned BOOLEAN DEFAULT 0 NOT NULL,
    folder VARCHAR NOT NULL
);
CREATE TABLE adapters (
    id INTEGER NOT NULL PRIMARY KEY,
    task_id INTEGER NOT NULL REFERENCES tasks ON DELETE CASCADE,
    step INTEGER,
    is_final BOOLEAN NOT NULL,
    weights_id INTEGER NOT NULL REFERENCES blobs,
    config_id INTEGER NOT NULL REFERENCES blobs,
    card_id INTEGER REFERENCES blobs,
    description_id INTEGER NOT NULL REFERENCES documents,
    source VARCHAR,
    created_at INTEGER NOT NULL,
    evicted_at INTEGER
);
CREATE UNIQUE INDEX one_row_per_adapter ON adapters (task_id, weights_id, config_id, coalesce(step, -1));
CREATE UNIQUE INDEX one_final_adapter ON adapters (task_id) WHERE is_final;
CREATE TABLE task_vectors (
    task_id INTEGER NOT NULL REFERENCES tasks ON DELETE CASCADE,
    view INTEGER NOT NULL,
    support_set INTEGER NOT NULL,
    extractor_id INTEGER NOT NULL REFERENCES documents,
    id INTEGER NOT NULL,
    blob_id INTEGER NOT NULL REFERENCES blobs,
    dim INTEGER NOT NULL,
    PRIMARY KEY (task_id, view, support_set, extractor_id)
) WITHOUT ROWID;
CREATE TABLE generators (
    id INTEGER NOT NULL PRIMARY KEY,
    base_model_id INTEGER NOT NULL REFERENCES base_models,
    version INTEGER NOT NULL,
    parent_id INTEGER REFERENCES generators ON DELETE SET NULL,
    blob_id INTEGER NOT NULL REFERENCES blobs,
    config BLOB NOT NULL,
    metrics BLOB NOT NULL,
    is_current BOOLEAN NOT NULL,
    created_at INTEGER NOT NULL,
    UNIQUE (base_model_id, version)
);
CREATE UNIQUE INDEX one_current_generator ON generators (base_model_id) WHERE is_current;
CREATE TABLE train_runs (
    id INTEGER NOT NULL PRIMARY KEY,
    base_model_id INTEGER NOT NULL REFERENCES base_models,
    state VARCHAR NOT NULL,
    config BLOB NOT NULL,
    step INTEGER NOT NULL,
    weights_id INTEGER REFERENCES blobs,
    optimizer_id INTEGER REFERENCES blobs,
    created_at INTEGER NOT NULL,
    updated_at INTEGER NOT NULL
);
CREATE UNIQUE INDEX one_running_train_run ON train_runs (base_model_id) WHERE state = 'running';
CREATE TABLE codes (
    id INTEGER NOT NULL PRIMARY KEY,
    task_id INTEGER NOT NULL REFERENCES tasks ON DELETE CASCADE,
    generator_id INTEGER NOT NULL REFERENCES generators ON DELETE CASCADE,
    adapter_id INTEGER NOT NULL REFERENCES adapters ON DELETE CASCADE,
    blob_id INTEGER NOT NULL REFERENCES blobs,
    bits DOUBLE NOT NULL,
    dw_error DOUBLE,
    UNIQUE (task_id, generator_id)
);
CREATE TABLE evaluations (
    id INTEGER NOT NULL PRIMARY KEY,
    task_id INTEGER NOT NULL REFERENCES tasks ON DELETE CASCADE,
    rung INTEGER NOT NULL,
    generator_id INTEGER REFERENCES generators ON DELETE CASCADE,
    data_id INTEGER NOT NULL REFERENCES blobs,
    metric INTEGER NOT NULL,
    nats_per_token DOUBLE NOT NULL,
    tokens INTEGER NOT NULL,
    utf8_bytes INTEGER NOT NULL,
    retained_gain DOUBLE,
    dw_error DOUBLE,
    settings_id INTEGER NOT NULL REFERENCES documents,
    created_at INTEGER NOT NULL
);
CREATE UNIQUE INDEX one_row_per_evaluation ON evaluations (
    task_id, rung, coalesce(generator_id, -1), data_id, metric
)"""

# An adapter's description is the JSON array [dtype, rank, parameters, target modules, layout]. The settings of an
# evaluation named the original that it compares with: a task has one, and its evaluations go with it.
_COPY = """
INSERT INTO blobs SELECT id, icm_digest(digest), size FROM old_blobs;
INSERT INTO base_models SELECT id, name, fingerprint, path, icm_pack(shape) FROM old_base_models;
CREATE TEMP TABLE described AS
    SELECT a.id, '[' || json_quote(a.dtype) || ',' || a.rank_max || ',' || a.parameters || ',' || a.target_modules
        || ',' || d.body || ']' AS body
    FROM old_adapters a JOIN old_documents d ON d.id = a.layout_id;
INSERT INTO documents (digest, body)
    SELECT icm_hash(body), icm_pack(body) FROM (
        SELECT body FROM described
        UNION SELECT body FROM old_documents WHERE id IN (SELECT extractor_id FROM old_task_vectors)
        UNION SELECT json_remove(settings, '$.original') FROM old_evaluations
    );
INSERT INTO tasks
    SELECT id, name, base_model_id, samples_id, eval_id, strftime('%s', created_at), pinned, coalesce(
        (SELECT icm_folder(a.source) FROM old_adapters a WHERE a.task_id = t.id AND a.is_final), ''
    )
    FROM old_tasks t;
INSERT INTO adapters
    SELECT a.id, task_id, step, is_final, weights_id, config_id, card_id,
        (SELECT d.id FROM documents d JOIN described x ON d.digest = icm_hash(x.body) WHERE x.id = a.id),
        icm_source(source, folder, step, is_final), strftime('%s', a.created_at), strftime('%s', evicted_at)
    FROM old_adapters a JOIN tasks t ON t.id = a.task_id;
DROP TABLE described;
INSERT INTO task_vectors
    SELECT task_id, view = 'context', support_set, d.id, v.id, blob_id, dim
    FROM old_task_vectors v JOIN old_documents o ON o.id = v.extractor_id
    JOIN documents d ON d.digest = icm_hash(o.body);
INSERT INTO generators
    SELECT id, base_model_id, version, parent_id, blob_id, icm_pack(config), icm_pack(metrics), is_current,
        strftime('%s', created_at)
    FROM old_generators ORDER BY id;
INSERT INTO train_runs
    SELECT id, base_model_id, state, icm_pack(config), step, weights_id, optimizer_id, strftime('%s', created_at),
        strftime('%s', updated_at)
    FROM old_train_runs;
INSERT INTO codes SELECT * FROM old_codes;
INSERT INTO blobs (digest, size)
    SELECT DISTINCT icm_digest(data), 0 FROM old_evaluations WHERE data NOT IN (SELECT digest FROM old_blobs);
INSERT INTO evaluations
    SELECT e.id, task_id,
        CASE rung WHEN 'base' THEN 0 WHEN 'code' THEN 1 WHEN 'generate' THEN 2 WHEN 'original' THEN 3 END,
        generator_id, (SELECT b.id FROM blobs b WHERE b.digest = icm_digest(e.data)),
        CASE metric WHEN 'nll' THEN 0 END, nats_per_token, tokens, utf8_bytes, retained_gain, dw_error,
        (SELECT d.id FROM documents d WHERE d.digest = icm_hash(json_remove(e.settings, '$.original'))),
        strftime('%s', created_at)
    FROM old_evaluations e"""
