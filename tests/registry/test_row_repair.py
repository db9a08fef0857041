"""`icm verify --repair` gives rows of which one bit flipped their values back, and leaves the others alone."""

from __future__ import annotations

import random
import shutil
import sqlite3
import struct
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from registry import schema as models
from registry.records import Extra
from registry.storage.folder import StorePaths
from registry.storage.row_repair import RowRepair
from registry.store import Store
from tests.faults.pages import places
from tests.registry.every_row import fill
from tests.registry.examples import new_store, offer

pytestmark = pytest.mark.kept_in("sqlite", reason="rows of SQLite's file")

TABLES = {
    name: table for name, table in models.Base.metadata.tables.items() if name not in ("base_labels", "run_codes")
}
COLUMNS = [(name, column.name) for name, table in TABLES.items() for column in table.columns]


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with a row in each of the tables."""
    root = tmp_path_factory.mktemp("template") / "store"
    with new_store(root) as store:
        fill(store)
        task = offer(store, "extra")
        extra = Extra(store.blobs.put(b"tokens"), "tokens.json", 6, 6)
        store.tasks.ingest([replace(task, adapters=[replace(task.adapters[0], extras=[extra])])])
    return root


@pytest.fixture
def root(template: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(template, tmp_path / "store"))


@contextmanager
def opened(root: Path) -> Iterator[sqlite3.Connection]:
    """Open the database behind icm's back."""
    with closing(sqlite3.connect(StorePaths(root).database, isolation_level=None)) as connection:
        yield connection


def rows_of(root: Path) -> dict[str, list[Any]]:
    with opened(root) as connection:
        return {name: sorted(map(ascii, connection.execute(f"SELECT * FROM {name}"))) for name in TABLES}


def repair(root: Path) -> list[RowRepair]:
    with Store.open(root) as store:
        repairs = store.repair_rows()
        left = [found for found in store.verify() if found.kind in ("row", "database", "dangling")]
    assert bool(left) == any(made.problem for made in repairs)
    return repairs


def flipped(value: Any, bit: int) -> Any:
    """Flip a bit of a value as SQLite may store it; text may become none."""
    if value is None:
        return b""  # which is nothing but a type too, and which no column converts
    if isinstance(value, (int, float)):
        form = ">q" if isinstance(value, int) else ">d"
        return struct.unpack(form, flipped(struct.pack(form, value), bit))[0]
    stored = bytearray(value.encode() if isinstance(value, str) else value)
    stored[bit // 8 % len(stored)] ^= 1 << bit % 8
    return bytes(stored)


def flip(root: Path, table: str, column: str, *bits: int) -> None:
    """Flip bits of a column of a row."""
    keys = [key.name for key in TABLES[table].primary_key]
    with opened(root) as connection:
        value, *key = connection.execute(f"SELECT {column}, {', '.join(keys)} FROM {table}").fetchall()[-1]
        changed = value
        for bit in bits:
            changed = flipped(changed, bit)
        new = "CAST(? AS TEXT)" if isinstance(value, str) else "?"
        where = " AND ".join(f"{name} = ?" for name in keys)
        connection.execute(f"UPDATE {table} SET {column} = {new} WHERE {where}", (changed, *key))


@pytest.mark.parametrize(("table", "column"), COLUMNS)
def test_a_flipped_bit_of_any_column_is_corrected(root: Path, table: str, column: str) -> None:
    before = rows_of(root)
    flip(root, table, column, random.Random(f"{table}.{column}").randrange(40, 56))
    (made, *_) = repair(root)
    assert (made.column, made.problem) == (column, None)
    assert rows_of(root) == before


def test_a_flipped_bit_of_the_file_is_corrected_or_left_alone(root: Path) -> None:
    before, database = rows_of(root), StorePaths(root).database
    intact = database.read_bytes()
    values = [place for place in places(database) if place.part == "value" and place.table in ("tasks", "extras")]
    for place in random.Random(7).sample(values, 20):
        damaged = bytearray(intact)
        damaged[place.offset] ^= 8
        database.write_bytes(damaged)
        assert all(made.problem is None for made in repair(root)), place
        assert rows_of(root) == before, place


def test_bytes_that_became_text_are_bytes_again(root: Path) -> None:
    before = rows_of(root)
    with opened(root) as connection:
        connection.execute("UPDATE documents SET digest = CAST(digest AS TEXT) WHERE id = 1")
    assert [made.column for made in repair(root)] == ["digest"]
    assert rows_of(root) == before


def test_a_database_that_cannot_be_read_is_left_alone(root: Path) -> None:
    database = StorePaths(root).database
    damaged = bytearray(database.read_bytes())
    damaged[next(place.offset for place in places(database) if place.part == "type")] = 0x7F
    database.write_bytes(damaged)
    assert [made.row for made in repair(root)] == ["the database"]
    assert database.read_bytes() == damaged


def test_a_row_with_two_flipped_bits_is_left_alone_and_named(root: Path) -> None:
    flip(root, "tasks", "folder", 1, 10)
    damaged = rows_of(root)
    (made,) = repair(root)
    assert made.row.startswith("row ")
    assert made.task == "extra"
    assert made.problem == "no single-bit change restores its checksum"
    assert rows_of(root) == damaged


def test_another_row_is_corrected_beside_one_that_is_left_alone(root: Path) -> None:
    flip(root, "tasks", "folder", 1, 10)
    flip(root, "codes", "bits", 54)
    assert [made.problem is None for made in repair(root)] == [False, True]


def test_a_correction_that_breaks_a_rule_is_taken_back(root: Path) -> None:
    with opened(root) as connection:
        name = connection.execute("SELECT name FROM tasks WHERE id = 1").fetchone()[0]
        connection.execute("UPDATE tasks SET name = ? WHERE id = 1", (chr(ord(name[0]) ^ 4) + name[1:],))
        connection.execute("UPDATE tasks SET name = ? WHERE id = 2", (name,))
    damaged = rows_of(root)
    problems = [made.problem for made in repair(root)]
    assert "the correction violates a constraint: UNIQUE constraint failed: tasks.name" in problems
    assert rows_of(root) == damaged


def test_a_blob_stays_whose_length_a_wrong_row_gets_wrong(root: Path) -> None:
    flip(root, "blobs", "size", 50, 51)
    with Store.open(root) as store:
        assert "length" in [found.kind for found in store.verify()]
        assert store.repair() == []


def test_a_copy_is_put_aside_before(root: Path) -> None:
    flip(root, "tasks", "pinned", 63)
    damaged = StorePaths(root).database.read_bytes()
    repair(root)
    assert damaged in [path.read_bytes() for path in StorePaths(root).quarantine.iterdir()]
