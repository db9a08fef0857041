"""A bit that flips in a column of a table is noticed, in both databases."""

from __future__ import annotations

import random
from contextlib import closing
from pathlib import Path

import pytest

from tests.faults.flips import Tally, summed
from tests.faults.pairs import Servers
from tests.faults.value_flips import postgres_flips, sqlite_flips
from tests.pg_server import new_database


def check(tallies: dict[str, Tally], each: int) -> None:
    assert {column: tally.flips for column, tally in tallies.items() if tally.flips < each} == {}
    assert {column: tally.unnoticed for column, tally in tallies.items() if tally.unnoticed} == {}


@pytest.mark.slow
def test_a_flip_in_any_column_of_sqlite_is_noticed(tmp_path: Path) -> None:
    with closing(sqlite_flips(tmp_path, random.Random(1))) as flips:
        check(flips.study(each=20), 20)


@pytest.mark.slow
def test_a_flip_in_any_column_of_postgresql_is_noticed(running: Servers) -> None:
    assert running.postgres is not None
    with closing(postgres_flips(new_database(running.postgres), random.Random(1))) as flips:
        check(flips.study(each=20), 20)


@pytest.mark.slow
def test_the_harness_sees_what_happens_without_the_checks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with closing(sqlite_flips(tmp_path, random.Random(1))) as flips:
        monkeypatch.setattr("tests.faults.value_flips.find_wrong_rows", lambda *_: [])
        assert summed(flips.study(each=1)).noticed == 0
