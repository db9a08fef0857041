"""Stores in PostgreSQL: opening one, rows to put into it, and all that is in it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Any

from registry.names import DatabaseUrl
from registry.schema import BaseModel, Blob, Task
from registry.storage.database import Database
from registry.storage.locks import Patience

if TYPE_CHECKING:
    from registry.storage.postgres import PostgresDatabase

NOW = "2026-01-02T03:04:05Z"


@contextmanager
def opened_server(
    url: str, *, create: bool = False, read_only: bool = False, patience: float = 60.0
) -> Iterator[PostgresDatabase]:
    """Open the rows of a store on a server, made if they are absent, and move them forward."""
    from registry.storage.postgres import PostgresDatabase, migrate

    database = PostgresDatabase(DatabaseUrl(url), command="test", read_only=read_only, patience=Patience(patience))
    with closing(database):
        if create:
            with database.creation():
                pass
        migrate(database)
        yield database


def add_rows(database: Database) -> None:
    """Add tasks that have something in each kind of column."""
    with database.write() as session:
        base = BaseModel(name="base", shape={"hidden_size": 64})
        samples = Blob(digest="ab" * 32, size=8 << 30)
        session.add(Task(name="Rust", base_model=base, folder="runs/é", created_at=NOW, pinned=True, tags=("a", "b")))
        session.add(Task(name="html", base_model=base, folder="", created_at=NOW, samples=samples, note="kept"))


def everything_in(url: str) -> dict[str, Any]:
    """Return the tables, triggers and rows of a database."""
    import psycopg

    with psycopg.connect(url) as connection:
        columns = connection.execute(
            "SELECT table_name::text, column_name::text FROM information_schema.columns "
            "WHERE table_schema = 'public' ORDER BY table_name, ordinal_position"
        ).fetchall()
        triggers = connection.execute(
            "SELECT tgrelid::regclass::text, tgname::text, prosrc FROM pg_trigger JOIN pg_proc ON pg_proc.oid = tgfoid "
            "WHERE NOT tgisinternal ORDER BY 1, 2"
        ).fetchall()
        tables = sorted({table for table, _ in columns})
        rows = {table: sorted(map(repr, connection.execute(f"SELECT * FROM {table}"))) for table in tables}
    return {"columns": columns, "triggers": triggers, "rows": rows}
