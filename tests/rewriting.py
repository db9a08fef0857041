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
