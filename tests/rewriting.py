"""Rows that a test changes as icm would, with their checks; a bare connection to the database makes damage."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from registry.row_checks import add_functions, guard
from registry.schema import Base


@contextmanager
def rewriting(database: Path) -> Iterator[sqlite3.Connection]:
    """Open a database to change rows; leaving the block commits."""
    with closing(sqlite3.connect(database)) as connection, connection:
        add_functions(connection)
        guard(connection, Base.metadata)
        yield connection


def moved(store: Path, before: Path, after: Path) -> Path:
    """Let the copy of a store say that it ingested its adapters from the folder `after`, not from `before`."""
    with rewriting(store / "registry.db") as database:
        for column in ("tasks.folder", "adapters.source"):
            table, name = column.split(".")
            database.execute(f"UPDATE {table} SET {name} = replace({name}, ?, ?)", (str(before), str(after)))
    return store
