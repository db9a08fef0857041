"""Stores in PostgreSQL: opening their tables, and all that is in them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Any

from registry.names import DatabaseUrl
from registry.storage.locks import Deadline

if TYPE_CHECKING:
    from registry.storage.postgres import PostgresDatabase


@contextmanager
def opened_server(
    url: str, *, create: bool = False, read_only: bool = False, deadline: float = 60.0
) -> Iterator[PostgresDatabase]:
    """Open the tables of a store on a server, made if they are absent."""
    from registry.storage.postgres import PostgresDatabase

    database = PostgresDatabase(DatabaseUrl(url), command="test", read_only=read_only, deadline=Deadline(deadline))
    with closing(database):
        if create:
            database.create("/nowhere")
        database.check_format()
        yield database


def everything_in(url: str) -> dict[str, Any]:
    """Return the tables and rows of a database."""
    import psycopg

    with psycopg.connect(url) as connection:
        columns = connection.execute(
            "SELECT table_name::text, column_name::text FROM information_schema.columns "
            "WHERE table_schema = 'public' ORDER BY table_name, ordinal_position"
        ).fetchall()
        tables = sorted({table for table, _ in columns})
        rows = {table: sorted(map(repr, connection.execute(f"SELECT * FROM {table}"))) for table in tables}
    return {"columns": columns, "rows": rows}
