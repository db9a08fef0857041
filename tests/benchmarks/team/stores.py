"""Stores on each pair of database and place of bytes, and stores with very many rows in PostgreSQL, made directly.

A row has the same check in both databases, so rows of a store in a folder are copied as they are, check and all.
"""

from __future__ import annotations

import hashlib
import shutil
import sqlite3
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any
from unittest import mock
from uuid import uuid4

import obstore
import psycopg
from obstore.store import from_url

from registry.row_checks import COLUMN, COLUMNS_OF, check_of
from registry.schema import Base, stored_as
from registry.store import Store
from tests.pg_server import new_database, pg_server
from tests.s3_server import S3Server, s3_server

PAIRS = ("sqlite + folder", "sqlite + s3", "postgresql + folder", "postgresql + s3")
BUCKET, _WRITERS, _DIGITS = "benchmarks", 12, 6
# What one task has rows in, besides those that many tasks share.
_OWN = ("tasks", "adapters", "codes", "evaluations")


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
    """Make a store of a pair with the rows and the bytes of one in a folder; return its address."""
    folder.mkdir(parents=True)
    address = new_store(pair, folder, at)
    if address.startswith("postgresql"):
        copy_rows(store / "registry.db", address)
    else:
        shutil.copyfile(store / "registry.db", Path(address) / "registry.db")
    files = [path for path in (store / "blobs").glob("*/*") if path.is_file()]
    with Store.open(address) as opened:
        backend: Any = opened.blobs._backend
        if pair.endswith("s3"):
            with ThreadPoolExecutor(_WRITERS) as pool:
                list(
                    pool.map(lambda path: backend._send(f"blobs/{path.name[0]}/{path.name}", path.read_bytes()), files)
                )
        else:
            for path in files:
                target = backend._paths.blob(path.name)
                target.parent.mkdir(exist_ok=True)
                shutil.copy2(path, target)
    return address


def _send(backend: Any, path: Path) -> None:
    backend._send(f"blobs/{path.name[0]}/{path.name}", path.read_bytes())


def copy_rows(database: Path, address: str) -> None:
    """Copy all rows of a SQLite file to the empty tables of a database."""
    with closing(sqlite3.connect(database)) as source, psycopg.connect(address) as target:
        _begin(target)
        for table in Base.metadata.sorted_tables:
            columns = ", ".join(_columns(table.name))
            _write(target, table.name, source.execute(f"SELECT {columns} FROM {table.name}"))
        _end(target)
    with psycopg.connect(address, autocommit=True) as target:
        target.execute("VACUUM ANALYZE")


def multiply(address: str, count: int) -> None:
    """Give a store in PostgreSQL with one task so many: they share its files, but for the codes, which have none."""
    with psycopg.connect(address) as target:
        _begin(target)
        one = {table: _rows_of(target, table) for table in (*_OWN, "blobs")}
        blob = max(row[0] for row in one["blobs"])
        code_size = next(row[2] for row in one["blobs"] if row[0] == one["codes"][0][4])
        codes = ((blob + n, hashlib.sha256(b"code %d" % n).digest(), code_size) for n in range(1, count))
        _write(target, "blobs", _sealed("blobs", codes))
        for table in _OWN:
            changed = _changes(table, len(one[table]), blob)
            rows = chain.from_iterable((changed(row, n) for row in one[table]) for n in range(1, count))
            _write(target, table, _sealed(table, rows))
        _end(target)
    with psycopg.connect(address, autocommit=True) as target:
        target.execute("VACUUM ANALYZE")


def _changes(table: str, rows: int, blob: int) -> Callable[[tuple[Any, ...], int], tuple[Any, ...]]:
    """Return what makes the row of the n-th task of that of the first: numbers, a name, the number of its code."""
    names = COLUMNS_OF[table]
    moved = [names.index(name) for name in ("task_id", "adapter_id") if name in names]

    def change(row: tuple[Any, ...], n: int) -> tuple[Any, ...]:
        values = list(row)
        values[0] += n * rows
        for at in moved:
            values[at] += n
        if table == "tasks":
            values[1] = f"task-{n:0{_DIGITS}d}"
        if table == "codes":
            values[names.index("blob_id")] = blob + n
        return tuple(values)

    return change


def _rows_of(target: psycopg.Connection, table: str) -> list[tuple[Any, ...]]:
    """Return all rows of a table, as SQLite stores them."""
    columns = ", ".join(COLUMNS_OF[table])
    query = f"SELECT {columns} FROM {table} ORDER BY 1"
    return [
        tuple(int(value) if isinstance(value, bool) else value for value in row)
        for row in target.execute(query.encode())
    ]


def _sealed(table: str, rows: Iterable[tuple[Any, ...]]) -> Iterator[tuple[Any, ...]]:
    return ((*row, check_of(table, *row)) for row in rows)


def _columns(table: str) -> list[str]:
    return [*COLUMNS_OF[table], COLUMN]


def _write(target: psycopg.Connection, table: str, rows: Iterable[tuple[Any, ...]]) -> None:
    columns = _columns(table)
    of = Base.metadata.tables[table].c
    flags = [at for at, name in enumerate(columns) if stored_as(of[name].type) is bool]
    query = f"COPY {table} ({', '.join(columns)}) FROM STDIN"
    with target.cursor() as cursor, cursor.copy(query.encode()) as copy:
        for row in rows:
            if flags:
                values = list(row)
                for at in flags:
                    values[at] = None if values[at] is None else bool(values[at])
                copy.write_row(values)
            else:
                copy.write_row(row)


def _begin(target: psycopg.Connection) -> None:
    """Leave triggers and references alone for a transaction: rows come with their checks, and in order."""
    target.execute("SET LOCAL session_replication_role = replica")


def _end(target: psycopg.Connection) -> None:
    """Let each table go on with the number after its last one."""
    for (sequence,) in target.execute("SELECT sequencename FROM pg_sequences").fetchall():
        table = sequence.removesuffix("_id_seq")
        query = f"SELECT setval('{sequence}', (SELECT coalesce(max(id), 0) + 1 FROM {table}), false)"
        target.execute(query.encode())
