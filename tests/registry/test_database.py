"""How SQLite is set up, and what its failures are called."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from sqlalchemy import Connection, insert
from sqlalchemy.exc import IntegrityError

from registry.errors import DamagedStore, StoreFull, StoreIOError, StoreLocked, StoreReadOnly
from registry.storage.locks import Deadline
from registry.storage.sqlite import SqliteDatabase
from registry.store import Store
from registry.tables import REFS
from registry.testing.databases import ref
from tests.registry.children import start, wait
from tests.registry.examples import ingest
from tests.shared import paths_of

pytestmark = pytest.mark.kept_in("sqlite", reason="how SQLite is set up")


def open_database(store: Store, *, read_only: bool = False, seconds: float = 0) -> SqliteDatabase:
    return SqliteDatabase(paths_of(store).database, read_only=read_only, deadline=Deadline(seconds))


@pytest.mark.parametrize(
    ("pragma", "value"),
    [
        ("synchronous", 2),
        ("trusted_schema", 0),
        ("cell_size_check", 1),
        ("mmap_size", 0),
        ("journal_mode", "truncate"),
        ("page_size", 1024),
    ],
)
def test_every_connection_has_the_safe_settings(store: Store, pragma: str, value: object) -> None:
    with open_database(store).read() as connection:
        assert connection.exec_driver_sql(f"PRAGMA {pragma}").scalar_one() == value


def insert_and_fail(connection: Connection) -> None:
    connection.execute(insert(REFS), ref("x"))
    connection.exec_driver_sql("INSERT INTO no_such_table VALUES (1)")


def test_a_failed_block_leaves_nothing(store: Store) -> None:
    database = open_database(store)
    with pytest.raises(DamagedStore), database.write() as connection:
        insert_and_fail(connection)
    assert store.names() == []


def test_a_second_writer_waits_and_is_told_that_the_store_is_locked(store: Store) -> None:
    database = open_database(store)
    with database.write(), pytest.raises(StoreLocked), open_database(store).write():
        pytest.fail("it began")


def test_what_is_waited_for_the_database_is_taken_from_the_seconds_of_the_command(store: Store) -> None:
    database = open_database(store, seconds=0.2)
    with open_database(store).write(), pytest.raises(StoreLocked), database.write():
        pytest.fail("it began")
    assert database.deadline.left == 0


def test_the_message_names_the_process_that_writes(store: Store, tmp_path: Path) -> None:
    def write() -> None:
        with Store.open(store.address, command="icm ingest all") as other, other._db.write():
            (tmp_path / "began").touch()
            time.sleep(60)

    pid = start(write)
    try:
        while not (tmp_path / "began").exists():
            time.sleep(0.01)
        with (
            Store.open(store.address, lock_timeout=0) as late,
            pytest.raises(StoreLocked, match=f"is locked by process {pid}: icm ingest all"),
        ):
            ingest(late, "x")
    finally:
        os.kill(pid, signal.SIGKILL)
        wait(pid)


def test_readers_do_not_wait_for_a_writer_that_has_not_committed(store: Store) -> None:
    database = open_database(store)
    with database.write() as connection:
        connection.execute(insert(REFS), ref("x"))
        assert store.names() == []


def test_a_read_only_database_refuses_writes(store: Store) -> None:
    database = open_database(store, read_only=True)
    with pytest.raises(StoreReadOnly), database.write():
        pytest.fail("it began")
    with pytest.raises(StoreReadOnly), database.read() as connection:
        connection.execute(insert(REFS), ref("x"))


def test_a_database_that_is_gone_is_damage_and_is_not_made_again(store: Store) -> None:
    paths_of(store).database.unlink()
    with pytest.raises(DamagedStore), open_database(store).read():
        pytest.fail("it opened")
    assert not paths_of(store).database.exists()


def test_a_database_that_is_there_and_cannot_be_opened_is_no_damage(store: Store) -> None:
    journal = Path(f"{paths_of(store).database}-journal")
    journal.unlink()
    journal.mkdir()
    with pytest.raises(StoreIOError), open_database(store).write() as connection:
        connection.execute(insert(REFS), ref("x"))


def test_a_full_disk_is_called_that(store: Store) -> None:
    with pytest.raises(StoreFull), open_database(store).write() as connection:
        outgrow_the_disk(connection)


def outgrow_the_disk(connection: Connection) -> None:
    connection.exec_driver_sql("PRAGMA max_page_count=1")
    connection.exec_driver_sql("CREATE TABLE t AS SELECT zeroblob(1000000)")


def test_a_broken_rule_of_the_schema_is_a_bug_and_keeps_its_error(store: Store) -> None:
    with pytest.raises(IntegrityError, match="NOT NULL"), open_database(store).write() as connection:
        connection.execute(insert(REFS), ref("x") | {"kind": None})


def test_paths_with_odd_characters_are_opened(tmp_path: Path) -> None:
    root = tmp_path / "a ?#%41 b"
    with Store.open(root, create=True):
        assert (root / "registry.db").exists()
