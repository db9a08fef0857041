"""The four pairs of database and blob place, on real servers, and a store on one of them with saved states.

sqlite+folder      ROOT/store                         all of it
sqlite+s3          ROOT/store, s3://icm/NUMBER        rows, bytes
postgres+folder    a database, ROOT/store             rows, bytes
postgres+s3        a database, s3://icm/NUMBER
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest import mock
from uuid import uuid4

from registry.errors import NotAStore, StoreNotFound, StoreUnavailable
from registry.store import Store
from tests.pg_server import new_database, pg_server
from tests.s3_server import s3_server

PAIRS = ("sqlite+folder", "sqlite+s3", "postgres+folder", "postgres+s3")
"""Names of databases and places, joined."""
PLAIN = PAIRS[0]


@dataclass(frozen=True)
class Servers:
    """The running servers.

    Attributes:
        postgres: The address of a database server, if requested.
        s3: The variables that clients need to find an object store, if requested.
    """

    postgres: str | None = None
    s3: dict[str, str] | None = None


@contextmanager
def servers(root: Path, pairs: tuple[str, ...] = PAIRS) -> Iterator[Servers]:
    """Run the servers that some pairs need, in a folder, for a block.

    Raises:
        CannotStart: The object store does not.
    """
    names = "+".join(pairs)
    with ExitStack() as stack:
        postgres = s3 = None
        if "postgres" in names:
            (root / "pg").mkdir()
            postgres = stack.enter_context(pg_server(root / "pg"))
        if "s3" in names:
            (root / "s3").mkdir()
            s3 = stack.enter_context(s3_server(root / "s3")).environment
            stack.enter_context(mock.patch.dict(os.environ, s3))
            from registry.storage.blobs.objects import connect

            connect("s3://icm/first", "tests").claim()  # the server takes seconds
        yield Servers(postgres, s3)


class Pair:
    """One store, with methods to create it, reset it to a saved state, and open it."""

    def __init__(self, name: str, root: Path, running: Servers) -> None:
        database, blobs = name.split("+")
        self.name, self.folder = name, root / "store"
        self.environment = (running.s3 or {}) if blobs == "s3" else {}
        """The variables that a process needs to reach it."""
        self.prefix = uuid4().hex if blobs == "s3" else None
        self.postgres = running.postgres if database == "postgres" else None
        self._database = "" if self.postgres is None else new_database(self.postgres)
        self._databases: dict[str, str] = {}
        self._objects: dict[str, dict[str, bytes]] = {}

    @property
    def address(self) -> str:
        """The value of `--store`."""
        return self._database or str(self.folder)

    @property
    def blobs(self) -> str | None:
        """The value of `icm init --blobs`; None if not needed."""
        if self.prefix is not None:
            return f"s3://icm/{self.prefix}"
        return str(self.folder) if self._database else None

    @property
    def is_plain(self) -> bool:
        """Whether it is one folder, which the first command creates."""
        return self.blobs is None

    def open(self, address: str = "", **options: Any) -> Store:
        """Open the store, maybe by another address of its database."""
        return Store.open(address or self.address, **options)

    def make(self) -> None:
        """Create an empty store if there is none."""
        self.open(create=True, blobs=self.blobs).close()

    def exists(self) -> bool:
        """Return whether there is a store."""
        try:
            with self.open(lock_timeout=30) as store:
                next(store.blobs.all(), None)
        except (StoreNotFound, NotAStore, StoreUnavailable):  # after a killed `icm init`, tables without a folder
            return False
        return True

    def clear(self) -> None:
        """Remove the store."""
        shutil.rmtree(self.folder, ignore_errors=True)
        if self._database:
            self._make_database(None)
        self._write_objects({})

    def save(self, state: str) -> None:
        """Save its current state."""
        shutil.rmtree(self._saved(state), ignore_errors=True)
        if self.folder.exists():
            shutil.copytree(self.folder, self._saved(state))
        if self._database:
            self._databases[state] = f"{self._name}_{len(self._databases)}"
            self._execute(f"CREATE DATABASE {self._databases[state]} TEMPLATE {self._name}")
        self._objects[state] = self._read_objects()

    def put_back(self, state: str, *, only_database: bool = False) -> None:
        """Restore a saved state, or only its database."""
        saved = self._saved(state)
        if only_database and self._database == "":
            shutil.copy2(saved / "registry.db", self.folder)
        if self._database:
            self._make_database(self._databases[state])
        if not only_database:
            shutil.rmtree(self.folder, ignore_errors=True)
            if saved.exists():
                shutil.copytree(saved, self.folder)
            self._write_objects(self._objects[state])

    def files(self) -> list[str]:
        """Return the names of all blobs and manifests, such as `blobs/3/3f9a...`."""
        names = (
            self._names() if self.prefix else [str(one.relative_to(self.folder)) for one in self.folder.rglob("*/*/*")]
        )
        return sorted(name for name in names if name.startswith(("blobs/", "manifests/")))

    def read(self, name: str) -> bytes:
        """Return the bytes of one of these files."""
        if self.prefix is None:
            return (self.folder / name).read_bytes()
        import obstore

        return bytes(obstore.get(self.objects, name).bytes())

    def write(self, name: str, data: bytes) -> None:
        """Replace the bytes of a file without using the store."""
        if self.prefix is None:
            (self.folder / name).unlink(missing_ok=True)
            (self.folder / name).write_bytes(data)
            return
        import obstore

        obstore.put(self.objects, name, data, use_multipart=False)

    def execute(self, *statements: str) -> None:
        """Change the database without using the store."""
        if self._database:
            import psycopg

            with psycopg.connect(self._database) as server:
                for statement in statements:
                    server.execute(statement.encode())
            return
        with closing(sqlite3.connect(self.folder / "registry.db")) as connection, connection:
            for statement in statements:
                connection.execute(statement)

    def cut_connections(self) -> None:
        """Make the database server end all connections to the store, as if they were dead."""
        self._execute(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{self._name}'")

    def _saved(self, state: str) -> Path:
        return self.folder.parent / "states" / state

    @property
    def _name(self) -> str:
        return self._database.partition("?")[0].rpartition("/")[2]

    def _make_database(self, template: str | None) -> None:
        self._execute(f"DROP DATABASE IF EXISTS {self._name} WITH (FORCE)")
        self._execute(f"CREATE DATABASE {self._name}" + (f" TEMPLATE {template}" if template else ""))

    def _execute(self, statement: str) -> None:
        import psycopg

        assert self.postgres is not None
        with psycopg.connect(self.postgres, autocommit=True) as connection:
            connection.execute(statement.encode())

    @cached_property
    def objects(self) -> Any:
        """The client of the prefix, for harnesses that bypass the store."""
        from obstore.store import from_url

        return from_url(f"s3://icm/{self.prefix}", client_options={"allow_http": True})

    def _read_objects(self) -> dict[str, bytes]:
        import obstore

        return {name: bytes(obstore.get(self.objects, name).bytes()) for name in self._names()}

    def _write_objects(self, wanted: dict[str, bytes]) -> None:
        """Restore missing and changed objects, and remove extra ones."""
        if self.prefix is None:
            return
        import obstore

        there = self._names()
        if extra := there.keys() - wanted.keys():
            obstore.delete(self.objects, sorted(extra))
        for name, data in wanted.items():
            if there.get(name) != hashlib.md5(data, usedforsecurity=False).hexdigest():
                obstore.put(self.objects, name, data, use_multipart=False)

    def _names(self) -> dict[str, str]:
        """Return the existing objects with their ETags."""
        if self.prefix is None:
            return {}
        import obstore

        pages = obstore.list(self.objects)
        return {str(entry["path"]): str(entry["e_tag"]).strip('"') for page in pages for entry in page}
