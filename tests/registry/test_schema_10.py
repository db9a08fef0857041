"""Schema 10: stores of icm 0.10 get columns for what codes keep, in both databases, and nothing else changes."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from registry.errors import DamagedStore
from registry.names import DatabaseUrl
from registry.storage.migrations.versions.schema_10 import _BEFORE
from registry.store import Store
from tests.faults.pages import places
from tests.golden.test_golden import restored, unpacked

pytestmark = pytest.mark.kept_in("sqlite", "folder", reason="it opens stores in each database by itself")

VERSION = "icm-0.10.0"
NEW = ("keep", "effect")


@dataclass
class Golden:
    """A copy of a store that icm 0.10 wrote."""

    address: Path | DatabaseUrl

    def run(self, statement: str) -> list[Any]:
        """Run a statement behind icm's back."""
        if isinstance(self.address, Path):
            with closing(sqlite3.connect(self.address / "registry.db")) as connection, connection:
                return connection.execute(statement).fetchall()
        import psycopg

        with psycopg.connect(self.address.secret) as server:
            server.execute("SET session_replication_role = replica")
            found = server.execute(statement.encode())
            return found.fetchall() if found.description else []

    def codes(self, columns: Sequence[str] = _BEFORE) -> list[Any]:
        """Return columns of all codes."""
        return self.run(f"SELECT {', '.join(columns)} FROM codes ORDER BY id")

    def problems(self) -> list[str]:
        """Move the store, and return what is wrong with it then."""
        with Store.open(self.address) as store:
            return [found.message for found in store.verify(read_data=True) if found.is_problem]


@pytest.fixture(params=["sqlite", "server"])
def golden(request: pytest.FixtureRequest, tmp_path: Path) -> Golden:
    """One in each database."""
    if request.param == "server":
        return Golden(DatabaseUrl(restored(VERSION, request.getfixturevalue("postgres"), tmp_path)))
    unpacked(VERSION, tmp_path)
    return Golden(tmp_path / "store")


def test_codes_stay_and_say_nothing_of_what_they_keep(golden: Golden) -> None:
    before = golden.codes()
    assert golden.problems() == []
    assert (golden.codes(), golden.codes(NEW)) == (before, [(None, None)] * len(before))
    with Store.open(golden.address, read_only=True) as store:
        made = [row.code for row in store.tasks.summaries()]
    assert [(code.effect, code.asked and code.asked.keep) for code in made if code] == [(None, None)] * len(before)


def test_a_row_that_was_wrong_before_is_wrong_after_and_no_other(golden: Golden) -> None:
    golden.run("UPDATE codes SET dw_error = 0.25 WHERE id = 2")
    (found,) = golden.problems()
    assert "checksum mismatch in row 2 of codes" in found


@pytest.fixture
def file(tmp_path: Path) -> Golden:
    """One in SQLite."""
    unpacked(VERSION, tmp_path)
    return Golden(tmp_path / "store")


def test_text_that_is_none_keeps_no_store_from_moving(file: Golden) -> None:
    file.run("UPDATE codes SET claim = CAST(x'ff' AS TEXT) WHERE id = 2")
    (found,) = file.problems()
    assert "row 2 of 3 of codes cannot be read" in found


def test_a_store_in_which_sqlite_does_not_find_a_row_is_left_to_the_icm_that_wrote_it(file: Golden) -> None:
    assert isinstance(file.address, Path)
    database = file.address / "registry.db"
    damaged = bytearray(database.read_bytes())
    _, second, _ = (place.offset for place in places(database) if (place.table, place.column) == ("codes", "rowid"))
    damaged[second] ^= 64  # the rows are numbered 1, 66, 3
    database.write_bytes(damaged)
    with pytest.raises(DamagedStore, match="1 of 2 intact rows of table codes cannot be found") as refused:
        Store.open(file.address)
    assert "with icm 0.10" in str(refused.value.hint)
    assert database.read_bytes() == damaged
