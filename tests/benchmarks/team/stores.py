"""Stores on each pair of database and place of bytes, and stores with very many rows in PostgreSQL."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock
from uuid import uuid4

import obstore
import psycopg
from obstore.store import from_url

from registry.store import Store
from registry.tables import HISTORY, REFS
from tests.pg_server import new_database, pg_server
from tests.s3_server import S3Server, s3_server

PAIRS = ("sqlite + folder", "sqlite + s3", "postgresql + folder", "postgresql + s3")
BUCKET, _AT_ONCE, _WHOLE = "benchmarks", 1_000, 10


@dataclass(frozen=True)
class Servers:
    """A database server and an object store that run."""

    database: str
    objects: S3Server


@contextmanager
def servers(folder: Path) -> Iterator[Servers]:
    """Run both, with their files in a folder, and let this process and those that it starts find the object store."""
    for name in ("pg", "s3"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    with (
        pg_server(folder / "pg", is_durable=True) as database,
        s3_server(folder / "s3") as objects,
        mock.patch.dict("os.environ", objects.environment),
    ):
        options: Any = {"client_options": {"allow_http": True}}
        obstore.put(from_url(f"s3://{BUCKET}", **options), "first", b"")  # makes the bucket
        yield Servers(database, objects)


def new_store(pair: str, folder: Path, at: Servers) -> str:
    """Make an empty store of a pair; return its address."""
    database, place = pair.split(" + ")
    address = str(folder / "store") if database == "sqlite" else new_database(at.database)
    blobs = f"s3://{BUCKET}/{uuid4().hex}" if place == "s3" else str(folder / "blobs")
    Store.open(address, create=True, blobs=None if pair == PAIRS[0] else blobs).close()
    return address


def copy_of(store: Path, pair: str, folder: Path, at: Servers) -> str:
    """Make a store of a pair with the states and the bytes of one in a folder; return its address."""
    folder.mkdir(parents=True)
    address = new_store(pair, folder, at)
    with Store.open(store, read_only=True) as source, Store.open(address) as target:
        for digests in _chunks([blob.digest for blob in source.blobs.all()]):
            target.blobs.put_all(list(map(source.blobs.read, digests)))
        target.adopt(source.generators())
        for names in _chunks(source.names()):
            target.adopt([task for name in names for task in source.history(name)])
    return address


def _chunks(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    return (texts[at : at + _AT_ONCE] for at in range(0, len(texts), _AT_ONCE))


def multiply(address: str, count: int) -> None:
    """Give a store in PostgreSQL with one task so many: ten with manifests of their own, the others with rows alone."""
    from tests.benchmarks.many_tasks import add_rows  # imports torch

    add_rows(address, _WHOLE)
    with psycopg.connect(address, autocommit=True) as target:
        new = f"SELECT 'task-' || lpad(n::text, 6, '0') AS new FROM generate_series({_WHOLE}, {count - 1}) n"
        for table in (REFS, HISTORY):
            values = ", ".join("new" if one.name in ("key", "name") else one.name for one in table.columns)
            query = (
                f"INSERT INTO {table.name} SELECT {values} FROM {table.name}, ({new}) AS more WHERE key = 'task-000000'"
            )
            target.execute(query.encode())
        target.execute("VACUUM ANALYZE")
