"""`icm doctor` and `icm path`."""

from collections.abc import Callable
from pathlib import Path

import pytest

from icm_cli.workflows.diagnosis import has_wal_reset_bug
from tests.cli.conftest import Ran

Icm = Callable[..., Ran]


def test_doctor_shows_versions_and_where_settings_come_from(icm: Icm) -> None:
    ran = icm("doctor")
    assert ran.code == 0
    assert "(ICM_STORE)" in ran.out
    assert "sqlalchemy" in ran.out


def test_doctor_says_the_same_in_json(icm: Icm, tmp_path: Path) -> None:
    document = icm("doctor", "--json").document
    assert document["ok"] is True
    assert document["settings"]["store"] == {"value": str(tmp_path / "store"), "source": "ICM_STORE"}
    assert document["checks"]["free_bytes"]["value"] > 0


def test_doctor_finds_a_database_that_is_none(icm: Icm, tmp_path: Path) -> None:
    store = tmp_path / "store"
    store.mkdir()
    (store / "FORMAT").write_text("icm store 2\n")
    (store / "registry.db").write_text("not a database, but long enough to look at" * 100)
    ran = icm("doctor", "--json")
    assert ran.code == 1
    assert "cannot be read" in ran.document["checks"]["schema"]["problem"]


def test_doctor_makes_no_store(icm: Icm, tmp_path: Path) -> None:
    icm("doctor")
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("release", "affected"),
    [
        ((3, 6, 23), False),
        ((3, 7, 0), True),
        ((3, 44, 5), True),
        ((3, 44, 6), False),
        ((3, 46, 1), True),
        ((3, 50, 7), False),
        ((3, 51, 2), True),
        ((3, 51, 3), False),
    ],
)
def test_the_sqlite_releases_with_the_wal_reset_bug_are_known(release: tuple[int, ...], affected: bool) -> None:
    assert has_wal_reset_bug(release) is affected


@pytest.mark.parametrize(
    ("what", "end"),
    [("store", "store"), ("db", "store/registry.db"), ("blobs", "store/blobs"), ("config", "config/icm/config.toml")],
)
def test_path_prints_where_things_are(icm: Icm, tmp_path: Path, what: str, end: str) -> None:
    assert icm("path", what).out == f"{tmp_path / end}\n"


def test_path_answers_in_json(icm: Icm, tmp_path: Path) -> None:
    assert icm("path", "log", "--json").document == {
        "name": "log",
        "path": str(tmp_path / "state" / "icm" / "errors.log"),
    }
