"""Rebuilding the database file works on any damage, and never leaves half of a file."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from sqlalchemy import insert

from registry.errors import DamagedStore, StoreLocked
from registry.storage.locks import Deadline
from registry.storage.paths import StorePaths
from registry.storage.sqlite import SqliteDatabase
from registry.tables import REFS
from registry.testing.databases import ref
from tests.registry.children import KILLED, run
from tests.registry.examples import ingest, new_store
from tests.registry.pairs import damage
from tests.shared import paths_of

pytestmark = pytest.mark.kept_in("sqlite", "folder", reason="the file of a database")


@pytest.fixture
def paths(tmp_path: Path) -> StorePaths:
    """The paths of a store with one task."""
    with new_store(tmp_path / "store") as store:
        ingest(store, "rust")
        return paths_of(store)


def database_of(paths: StorePaths, seconds: float = 5.0) -> SqliteDatabase:
    return SqliteDatabase(paths.database, read_only=False, deadline=Deadline(seconds))


def rebuild(paths: StorePaths) -> None:
    with new_store(paths.root) as store:
        store.rebuild()


def names(paths: StorePaths) -> list[str]:
    with new_store(paths.root) as store:
        return store.names()


def cut(path: Path) -> None:
    os.truncate(path, 1500)


LOSSES: dict[str, Callable[[Path], object]] = {
    "gone": os.unlink,
    "empty": lambda path: path.write_bytes(b""),
    "cut": cut,
    "garbage": lambda path: path.write_bytes(b"garbage" * 1000),
    # Not a newer one: FORMAT is known by then.
    "flipped version": lambda path: sqlite3.connect(path).execute("PRAGMA user_version=3").connection.close(),
    "flipped application": lambda path: sqlite3.connect(path).execute("PRAGMA application_id=7").connection.close(),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_a_lost_database_is_told_and_rebuilt(paths: StorePaths, loss: str) -> None:
    LOSSES[loss](paths.database)
    with pytest.raises(DamagedStore) as error:
        names(paths)
    assert error.value.hint == "run `icm verify --repair` to rebuild the database from the manifests"
    rebuild(paths)
    assert names(paths) == ["rust"]
    assert not any(paths.tmp.iterdir())


@pytest.mark.parametrize(
    "statement",
    [
        "DELETE FROM meta",
        "UPDATE meta SET changes = 'many'",
        "UPDATE meta SET seq = x'ff'",
        "UPDATE meta SET store = x'ff'",
        "INSERT INTO meta SELECT 'another', format, blobs, changes, seq FROM meta",
    ],
)
def test_a_store_that_does_not_know_its_number_is_damaged_and_gets_a_new_one(paths: StorePaths, statement: str) -> None:
    before = database_of(paths).meta()
    with new_store(paths.root) as store:
        damage(store, statement)
        with pytest.raises(DamagedStore, match="does not identify its store"):
            store.changes()
    rebuild(paths)
    after = database_of(paths).meta()
    assert after.store != before.store
    assert after.changes > before.changes  # those who watch the store look again
    assert names(paths) == ["rust"]


def test_the_journal_of_a_lost_database_is_not_applied_to_the_new_one(paths: StorePaths) -> None:
    with closing(sqlite3.connect(paths.database, isolation_level=None)) as writing:
        writing.executescript(
            "PRAGMA cache_size=1; BEGIN; UPDATE refs SET version = 2; CREATE TABLE t AS SELECT zeroblob(100000)"
        )
        of_rust_alone = paths.journal.read_bytes()
        writing.execute("ROLLBACK")
    with new_store(paths.root) as store:
        ingest(store, "html")
    paths.journal.write_bytes(of_rust_alone)
    paths.database.unlink()  # to a file that is there, SQLite would apply it at once
    rebuild(paths)
    assert names(paths) == ["html", "rust"]
    assert list(database_of(paths).damage()) == []


def test_a_database_that_another_program_writes_is_not_replaced(paths: StorePaths) -> None:
    before = database_of(paths).meta()
    with closing(sqlite3.connect(paths.database, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(StoreLocked), database_of(paths, 0).rebuild():
            pytest.fail("it began")
    assert database_of(paths).meta() == before


def test_a_rebuild_that_fails_leaves_no_file(paths: StorePaths) -> None:
    def fail() -> None:
        with database_of(paths).rebuild() as connection:
            connection.execute(insert(REFS), ref("html"))
            raise LookupError

    with pytest.raises(LookupError):
        fail()
    assert not any(paths.tmp.iterdir())
    assert names(paths) == ["rust"]


@pytest.mark.parametrize("point", ["database-rebuilt", "journal-unlinked"])
@pytest.mark.parametrize("loss", [None, "gone", "garbage"])
def test_a_killed_rebuild_is_made_again(paths: StorePaths, point: str, loss: str | None) -> None:
    if loss is not None:
        LOSSES[loss](paths.database)
    assert run(lambda: rebuild(paths), failpoint=point) == KILLED
    if loss is None:
        assert names(paths) == ["rust"]
    rebuild(paths)
    assert names(paths) == ["rust"]
    assert not any(paths.tmp.iterdir())


def test_the_new_database_is_as_the_old_one_was_made(paths: StorePaths) -> None:
    def pragmas() -> list[object]:
        with closing(sqlite3.connect(paths.database)) as connection:
            wanted = ("page_size", "application_id", "user_version", "encoding")
            return [connection.execute(f"PRAGMA {name}").fetchone() for name in wanted]

    before, mode = pragmas(), paths.database.stat().st_mode
    rebuild(paths)
    assert (pragmas(), paths.database.stat().st_mode) == (before, mode)
