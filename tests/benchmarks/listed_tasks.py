"""A store of many tasks with all that listings read: codes, task vectors, measurements, and a third of them evicted.

    python -P tests/benchmarks/listed_tasks.py FOLDER TASKS      with PYTHONPATH set to the revision that is to write it

Adapters, codes and vectors are files of their own, as small as they may be; only those of the first task can be
decoded, but all vectors can be read. What each task has in rows: one adapter, one code, two views of four support
sets, and three measurements.
"""

from __future__ import annotations

import hashlib
import sqlite3
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import fields, replace
from pathlib import Path

import torch

from icm_cli.app import run
from icmlora.task_vectors.file import vectors_to_bytes
from registry.records import NewAdapter, NewCode, NewEvaluation, NewVector, TaskIngest
from registry.row_checks import add_functions, guard
from registry.schema import Base
from registry.store import Store
from tests.benchmarks.many_tasks import BASE_MODEL, build

_AT_ONCE, _SETS, _WIDTH = 1_000, 4, 64
_VIEWS = ("adapted", "context")
_EXTRACTOR = {"name": "last-layer", "version": 1, "base": "f00d", "dtype": "float32", "source": "samples"}
_TEXT = "ab" * 32
# What one task has besides its adapter and its code, for the others: rows of their own that say the same.
_COPIED = """
INSERT INTO {table} ({columns}) SELECT {values} FROM {table} AS one JOIN tasks AS other ON other.id > 1
WHERE one.task_id = 1 ORDER BY other.id, one.id"""
_VECTORS = {
    "task_id": "other.id",
    "view": "one.view",
    "support_set": "one.support_set",
    "extractor_id": "one.extractor_id",
    "id": "one.id + (other.id - 1) * (SELECT count(*) FROM task_vectors WHERE task_id = 1)",
    "blob_id": "(SELECT id FROM blobs WHERE digest = (SELECT vectors FROM made WHERE number = other.id))",
    "dim": "one.dim",
}
_MEASURED = (
    *("rung", "generator_id", "data_id", "metric", "nats_per_token", "tokens", "utf8_bytes", "dw_error"),
    *("settings_id", "created_at", "score", "load_in"),
)


def main(folder: Path, count: int) -> None:
    """Make the store `FOLDER/store`."""
    store = folder / "store"
    build(folder / "one", 0, 1)
    for command in (
        ["ingest", str(folder / "one"), "--no-vectors"],
        ["train", *["--no-eval", "--refine", "0", "--steps", "1"]],
    ):
        assert run(["--store", str(store), "--quiet", *command]) == 0
    with Store.open(store) as opened:
        made = _first_task(opened)
        for first in range(1, count, _AT_ONCE):
            made |= _more_tasks(opened, range(first, min(first + _AT_ONCE, count)))
    with closing(sqlite3.connect(store / "registry.db")) as database, database:
        _more_rows(database, store / "blobs", made)
        gone = database.execute("SELECT digest FROM blobs JOIN adapters ON weights_id = blobs.id WHERE evicted_at")
        digests = [digest for (digest,) in gone]
    for digest in digests:
        _file(store / "blobs", digest).unlink()


def _first_task(store: Store) -> dict[str, bytes]:
    """Give the first task vectors and measurements; returns its name -> the digest of its vectors' file."""
    name, generator = "task-000000", store.generators.current(BASE_MODEL)
    assert generator is not None
    (blob,) = store.blobs.put_all([_vectors(0)])
    places = [(view, place) for view in _VIEWS for place in range(_SETS)]
    store.vectors.add([NewVector(name, view, place, _EXTRACTOR, blob, _WIDTH) for view, place in places])
    settings = {"dtype": "float32", "max_tokens": 256}
    figures = {"value": 2.0, "count": 100, "utf8_bytes": 400, "squared_error": None, "data": _TEXT}
    gained = {("base", None): None, ("original", None): 1.0, ("code", generator.id): 0.97}
    store.evaluations.add(
        [
            NewEvaluation(name, rung, number, retained_gain=gain, settings=settings, **figures)
            for (rung, number), gain in gained.items()
        ]
    )
    return {name: bytes.fromhex(blob)}


def _more_tasks(store: Store, numbers: Sequence[int]) -> dict[str, bytes]:
    """Record tasks with an adapter and a code, and store their vectors; returns name -> digest of those."""
    generator, (known,) = store.generators.current(BASE_MODEL), [next(store.tasks.summaries())]
    assert generator is not None
    assert known.code is not None
    adapter = NewAdapter(**{field.name: getattr(known.final, field.name) for field in fields(NewAdapter)})
    names = {number: f"task-{number:06d}" for number in numbers}
    kinds = (
        [f"weights {number}".encode().ljust(900, b".") for number in numbers],
        [f"code {number}".encode().ljust(300 + number % 200, b".") for number in numbers],
        [_vectors(number) for number in numbers],
    )
    weights, codes, vectors = (store.blobs.put_all(kind) for kind in kinds)
    offered = []
    for name, blob in zip(names.values(), weights, strict=True):
        key = hashlib.sha256(name.encode()).hexdigest()
        own = replace(adapter, weights=blob, source=f"loras/{name}", tensors_key=key)
        offered.append(TaskIngest(name, BASE_MODEL, [own]))
    store.tasks.ingest(offered)
    finals = {final.task: final for _, found in store.tasks.wholes(list(names.values())).values() for final in found}
    store.codes.add(
        generator.id,
        [
            NewCode(finals[name], blob, 2400.0 + number, (0.05 + number % 1000 / 5000) ** 2)
            for (number, name), blob in zip(names.items(), codes, strict=True)
        ],
    )
    return {name: bytes.fromhex(blob) for name, blob in zip(names.values(), vectors, strict=True)}


def _vectors(number: int) -> bytes:
    draw = torch.Generator().manual_seed(number)
    own = torch.randn(1, _WIDTH, generator=draw)
    return vectors_to_bytes({view: own + torch.randn(_SETS, _WIDTH, generator=draw) / 3 for view in _VIEWS})


def _more_rows(database: sqlite3.Connection, blobs: Path, vectors: dict[str, bytes]) -> None:
    """Copy the vectors and measurements of the first task to the others, evict each third, mark some."""
    add_functions(database)
    guard(database, Base.metadata)
    database.execute("CREATE TEMP TABLE made (number INTEGER PRIMARY KEY, vectors)")
    numbers = dict(database.execute("SELECT name, id FROM tasks"))
    database.executemany("INSERT INTO made VALUES (?, ?)", [(numbers[name], found) for name, found in vectors.items()])
    files = [(digest, _file(blobs, digest).stat().st_size) for digest in vectors.values()]
    database.executemany("INSERT OR IGNORE INTO blobs (digest, size) VALUES (?, ?)", files)
    measured = {name: f"one.{name}" for name in _MEASURED}
    measured |= {"task_id": "other.id", "retained_gain": "one.retained_gain - (other.id % 1000) / 5000.0"}
    for table, values in {"task_vectors": _VECTORS, "evaluations": measured}.items():
        columns = ", ".join(values)
        database.execute(_COPIED.format(table=table, columns=columns, values=", ".join(values.values())))
    database.execute("UPDATE adapters SET evicted_at = created_at WHERE task_id % 3 = 0")
    database.execute("UPDATE tasks SET tags = 'prod team/search' WHERE id % 7 = 0")
    database.execute("UPDATE tasks SET pinned = 1 WHERE id % 11 = 0 AND id % 3")


def _file(blobs: Path, digest: bytes) -> Path:
    return blobs / digest.hex()[0] / digest.hex()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
