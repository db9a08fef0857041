"""The copy of the database from before the last deletion, and putting it back."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from registry.errors import DamagedStore, StoreLocked
from registry.storage.kept import restore_database
from registry.storage.sqlite import copy_of
from registry.store import Store
from tests.faults.sqlite_calls import failing, is_reachable
from tests.registry.examples import ingest, new_store

pytestmark = pytest.mark.kept_in("sqlite", "folder", reason="the copy of the file that a store folder keeps")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A store of two tasks, from which a third one was removed."""
    with new_store(tmp_path / "store") as store:
        for name in ("rust", "html", "sql"):
            ingest(store, name)
        store.tasks.remove(["sql"])
    return tmp_path / "store"


def restore(root: Path) -> str:
    return restore_database(root, lock_timeout=0, command="test")


def names(root: Path) -> list[str]:
    with Store.open(root) as store:
        assert [finding for finding in store.verify(read_data=True) if finding.is_problem] == []
        return store.tasks.names()


def test_what_was_there_before_the_last_deletion_comes_back(root: Path) -> None:
    assert names(root) == ["html", "rust"]
    assert restore(root).endswith("Z")
    assert names(root) == ["html", "rust", "sql"]


@pytest.mark.skipif(not is_reachable(), reason="the SQLite of this Python hides its functions")
def test_a_read_that_fails_is_an_error_and_no_hole_in_the_copy(root: Path) -> None:
    def copied() -> bytes:
        with closing(sqlite3.connect(root / "registry.db")) as connection:
            return copy_of(connection)

    whole, failed = copied(), 0
    for number in range(1, 60, 4):
        with failing(number, {"xRead": sqlite3.SQLITE_IOERR_READ}, 1):
            try:
                assert copied() == whole
            except sqlite3.OperationalError:
                failed += 1
    assert failed > 10


def test_a_database_that_is_none_any_more_is_replaced_and_kept_aside(root: Path) -> None:
    (root / "registry.db").write_bytes(b"nothing")
    restore(root)
    assert names(root) == ["html", "rust", "sql"]
    assert b"nothing" in [path.read_bytes() for path in (root / "quarantine").iterdir()]


def test_a_journal_beside_it_does_not_reach_the_copy(root: Path) -> None:
    with closing(sqlite3.connect(root / "registry.db", isolation_level=None)) as connection:
        connection.execute("PRAGMA cache_size=1")
        connection.execute("BEGIN IMMEDIATE")
        connection.execute("UPDATE tasks SET name = 'lost' || id")
        connection.execute("CREATE TABLE large AS SELECT zeroblob(100000)")
        journal = (root / "registry.db-journal").read_bytes()
        assert journal
    (root / "registry.db-journal").write_bytes(journal)
    restore(root)
    assert names(root) == ["html", "rust", "sql"]


@pytest.mark.parametrize("content", [None, b"no copy"])
def test_without_a_good_copy_nothing_changes(root: Path, content: bytes | None) -> None:
    (root / "registry.db.kept").unlink()
    if content is not None:
        (root / "registry.db.kept").write_bytes(content)
    with pytest.raises(DamagedStore):
        restore(root)
    assert names(root) == ["html", "rust"]


def test_a_database_in_use_is_not_replaced(root: Path) -> None:
    with Store.open(root), pytest.raises(StoreLocked):
        restore(root)
