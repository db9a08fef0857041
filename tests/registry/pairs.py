"""The pairs of a database and a place of bytes that the tests of the registry run on, one for a run of pytest.

    pytest tests/registry --pair postgres+s3

A test requests a store at a folder, and `place_of` returns its address. Tests only for SQLite's file, or for a folder
of blobs, have a mark: `kept_in("sqlite", reason=...)`.
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from registry.names import DatabaseUrl
from registry.store import Store
from tests.pg_server import drop_database, new_database

DEFAULT = "sqlite+folder"
PAIRS = (DEFAULT, "sqlite+s3", "postgres+folder", "postgres+s3")


@dataclass
class Pair:
    """The pair of a run of pytest.

    Attributes:
        name: One of `PAIRS`.
        server: The address of a PostgreSQL, if the pair needs one.
    """

    name: str = DEFAULT
    server: str = ""
    _places: dict[Path, tuple[Path | DatabaseUrl, str | None]] = field(default_factory=dict)

    @property
    def parts(self) -> list[str]:
        """The storage of refs and of bytes."""
        return self.name.split("+")

    def place_of(self, root: Path) -> tuple[Path | DatabaseUrl, str | None]:
        """Return the address of the store for a folder, and the location of its bytes."""
        if root not in self._places:
            database, blobs = self.parts
            name = hashlib.sha256(bytes(root)).hexdigest()[:32]  # every process gets the same location
            address = root if database == "sqlite" else DatabaseUrl(new_database(self.server, f"icm_{name}"))
            far = f"s3://icm/{name}" if blobs == "s3" else str(root)
            is_there = database == "sqlite" and (root / "FORMAT").exists()  # a copy of another store
            self._places[root] = address, None if self.name == DEFAULT or is_there else far
        return self._places[root]

    @contextmanager
    def cleared(self) -> Iterator[None]:
        """Forget the stores that are made in a block, with their databases."""
        before = set(self._places)
        yield
        for root in set(self._places) - before:
            address, _ = self._places.pop(root)
            if isinstance(address, DatabaseUrl):
                drop_database(self.server, address.secret)


pair = Pair()
"""The pair of this run."""


def damage(store: Store, statement: str) -> None:
    """Change the database behind icm's back, as a broken disk does."""
    if isinstance(store.address, Path):
        with closing(sqlite3.connect(store.address / "registry.db", isolation_level=None)) as connection:
            connection.execute(statement)
        return
    import psycopg

    with psycopg.connect(store.address.secret, autocommit=True) as server:
        server.execute(statement.encode())


def lose(store: Store, digest: str) -> None:
    """Remove the bytes of a blob or manifest without using the store."""
    for files in (store.blobs, store.manifests):
        files._backend.delete(digest)


def overwrite(store: Store, digest: str, change: Callable[[bytes], bytes]) -> None:
    """Replace the bytes of a blob or manifest."""
    backend = store.blobs._backend if store.blobs.exists(digest) else store.manifests._backend
    with backend.get(digest) as file:
        data = change(file.read())
    backend.delete(digest)
    with backend.batch() as batch:
        batch.put(digest, data)
