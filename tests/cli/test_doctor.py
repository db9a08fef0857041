"""`icm doctor` and `icm path`."""

import fcntl
from collections.abc import Callable
from pathlib import Path

import pytest

from icm_cli.errors import ExitCode
from icmlora.fleet.maintenance import has_wal_reset_bug
from tests.cli.conftest import Ran
from tests.cli.homeless import leave_home

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


def test_doctor_finds_a_file_that_is_not_a_database(icm: Icm, tmp_path: Path) -> None:
    store = tmp_path / "store"
    store.mkdir()
    (store / "FORMAT").write_text("icm store 2\n")
    (store / "registry.db").write_text("not a database, but long enough to look at" * 100)
    ran = icm("doctor", "--json")
    assert ran.code == 1
    assert "cannot be read" in ran.document["checks"]["schema"]["problem"]


def test_doctor_finds_nothing_wrong_with_a_good_store(icm: Icm, stored: Path, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "store").rglob("*")}
    document = icm("doctor", "--json").document
    assert (document["ok"], document["checks"]["store"]) == (True, {"value": "icm store 2", "problem": None})
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "store").rglob("*")} == before


@pytest.mark.parametrize(
    ("file", "content", "code", "fact"),
    [
        ("registry.db", "", ExitCode.NO_STORE, "not an icm database"),
        ("FORMAT", "icm store 9\n", ExitCode.TOO_NEW, "'icm store 9'"),
        ("registry.db", None, ExitCode.DAMAGED, "unable to open"),
        ("lock", None, ExitCode.FAILED, "lock"),
    ],
)
def test_doctor_says_why_other_commands_refuse_the_store(
    icm: Icm, stored: Path, tmp_path: Path, file: str, content: str | None, code: ExitCode, fact: str
) -> None:
    path = tmp_path / "store" / file
    path.unlink()
    if content is not None:
        path.write_text(content)
    refused, ran = icm("ls", "--json"), icm("doctor", "--json")
    problem = ran.document["checks"]["store"]["problem"]
    assert (refused.code, ran.code, ran.document["ok"]) == (code, ExitCode.FAILED, False)
    assert problem.startswith(refused.error["message"])
    assert (fact in problem, problem in icm("doctor").err) == (True, True)


def test_doctor_says_that_the_store_is_locked(icm: Icm, stored: Path, tmp_path: Path) -> None:
    with (tmp_path / "store" / "lock").open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        ran = icm("doctor", "--lock-timeout", "0", "--json")
    assert (ran.code, "is in use" in ran.document["checks"]["store"]["problem"]) == (ExitCode.FAILED, True)


def test_doctor_creates_no_store(icm: Icm, tmp_path: Path) -> None:
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


def test_path_needs_no_home_for_paths_outside_it(icm: Icm, monkeypatch: pytest.MonkeyPatch) -> None:
    leave_home(monkeypatch)
    assert icm("path").code == 0
    assert icm("path", "log").code == ExitCode.USAGE
    monkeypatch.delenv("ICM_STORE")
    monkeypatch.setenv("ICM_LOG", "/log")
    assert icm("path", "log").out == "/log\n"
    ran = icm("path")
    assert (ran.code, "set HOME or XDG_DATA_HOME or ICM_STORE" in ran.err) == (ExitCode.USAGE, True)
