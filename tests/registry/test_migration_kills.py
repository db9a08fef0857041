"""A migration that is killed anywhere leaves the store as before or as after, and the next command moves it.

Killed before each statement, before the commit, and before each call of the seam to files.
"""

from __future__ import annotations

import os
import signal
import sqlite3
from collections.abc import Callable
from contextlib import closing
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from sqlalchemy import Engine, event

from registry import files as fs
from registry.storage import sqlite
from registry.store import Store
from tests.pg_server import new_database
from tests.registry import next_schema
from tests.registry.children import KILLED, run
from tests.registry.every_row import fill
from tests.registry.examples import new_store
from tests.registry.servers import add_rows, everything_in, opened_server

pytestmark = pytest.mark.kept_in("sqlite", "folder", reason="it makes a store in each database by itself")

JOURNAL = bytes.fromhex("d9d505f920a163d7")  # how one begins that SQLite has to roll back


class Kills(NamedTuple):
    """What kills did to a store: how many there were, whether it moved in the end, and what was not whole."""

    number: int
    moved: bool
    half: list[object]


def die_at(number: int) -> None:
    """Kill this process at one of its steps, counted from here."""
    steps = count(1)

    def step() -> None:
        if next(steps) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    event.listen(Engine, "before_cursor_execute", lambda *_: step())
    event.listen(Engine, "commit", lambda _: step())
    for name in ("create", "write", "fsync", "replace", "unlink"):
        setattr(fs, name, _after(step, getattr(fs, name)))


def _after(step: Callable[[], None], real: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        step()
        return real(*arguments)

    return call


def killed_everywhere(command: Callable[[], object], state: Callable[[], object], stride: int = 1) -> Kills:
    """Kill a command at its first step, then at a later one, until it ends."""
    before, seen = state(), list[object]()
    for number in count(1, stride):

        def child(number: int = number) -> None:
            die_at(number)
            command()

        status = run(child)
        seen.append(state())
        if status != KILLED:
            half = [found for found in seen if found not in (before, seen[-1])]
            return Kills(len(seen), moved=status == 0 and seen[-1] != before, half=half)
    raise AssertionError


def rows_of(root: Path, name: str = "registry.db") -> object:
    with closing(sqlite3.connect(root / name)) as connection:
        return connection.execute("PRAGMA user_version").fetchall(), list(connection.iterdump())


def open_and_close(root: Path) -> None:
    Store.open(root).close()


@pytest.fixture
def full(tmp_path: Path) -> Path:
    with new_store(tmp_path / "store") as store:
        fill(store)
    return tmp_path / "store"


def test_a_store_that_is_killed_as_it_moves_to_the_next_schema(
    full: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    next_schema.have_it(monkeypatch, tmp_path / "versions")
    kills = killed_everywhere(lambda: open_and_close(full), lambda: rows_of(full))
    assert kills.number > 15
    assert (kills.moved, kills.half) == (True, [])


def test_a_store_that_is_killed_while_the_file_has_a_part_of_the_next_schema(
    full: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in the middle of SQLite's own commit: without room in memory, pages are written as they change."""
    with closing(sqlite3.connect(full / "registry.db")) as connection, connection:
        connection.execute("UPDATE documents SET body = randomblob(100000)")
    next_schema.have_it(monkeypatch, tmp_path / "versions", next_schema.change_large_rows)
    monkeypatch.setattr(sqlite, "_PRAGMAS", (*sqlite._PRAGMAS, "cache_size=1"))
    journals = []

    def state() -> object:
        journal = full / "registry.db-journal"
        journals.append(journal.exists() and journal.read_bytes()[:8] == JOURNAL)
        return rows_of(full)

    kills = killed_everywhere(lambda: open_and_close(full), state)
    assert (kills.moved, kills.half) == (True, [])
    assert any(journals)


def test_these_kills_find_a_migration_that_commits_a_part(
    full: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    next_schema.have_it(monkeypatch, tmp_path / "versions", next_schema.commit_half_way)
    kills = killed_everywhere(lambda: open_and_close(full), lambda: rows_of(full))
    assert kills.half or not kills.moved


@pytest.mark.parametrize("stride", [9, pytest.param(1, marks=pytest.mark.fault)])
def test_a_store_on_a_server_that_is_killed_as_it_is_made_and_as_it_moves(
    postgres: str, stride: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = new_database(postgres)

    def make() -> None:
        with opened_server(url, create=True):
            pass

    def move() -> None:
        with opened_server(url):
            pass

    kills = killed_everywhere(make, lambda: everything_in(url), stride)
    assert (kills.moved, kills.half) == (True, [])
    with opened_server(url) as database:
        add_rows(database)
    next_schema.have_it(monkeypatch, tmp_path / "versions")
    kills = killed_everywhere(move, lambda: everything_in(url), stride)
    assert kills.number > 50 // stride
    assert (kills.moved, kills.half) == (True, [])

    def check() -> None:
        next_schema.describe_it()
        with opened_server(url) as database:
            assert list(database.damage()) == []

    assert run(check) == 0


def test_these_kills_find_a_migration_on_a_server_that_commits_a_part(
    postgres: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = new_database(postgres)
    with opened_server(url, create=True) as database:
        add_rows(database)

    def move() -> None:
        with opened_server(url):
            pass

    next_schema.have_it(monkeypatch, tmp_path / "versions", next_schema.commit_half_way)
    kills = killed_everywhere(move, lambda: everything_in(url), 5)
    assert kills.half or not kills.moved
