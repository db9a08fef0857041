"""`Fleet.verify`, `repair`, `prune` and `doctor`."""

from __future__ import annotations

import os
import sqlite3
import time
from contextlib import closing
from pathlib import Path

import pytest

from icmlora import DamagedStore, Fleet, StoreLocked, StoreNotFound, TaskNotFound
from tests.icmlora.fleet.stores import blob_of, code_blobs, damage, files_of, has_blob, is_sound, size_of
from tests.rewriting import rewriting


def test_a_trained_store_is_sound(fleet: Fleet) -> None:
    assert list(fleet.verify(read_data=True)) == []


def test_changed_bytes_are_found_only_by_reading(fleet: Fleet) -> None:
    code = code_blobs(fleet)["rules"]
    damage(blob_of(fleet, code))
    assert list(fleet.verify()) == []
    (finding,) = fleet.verify(read_data=True)
    assert (finding.kind, finding.digest, finding.tasks, finding.is_problem) == ("digest", code, ("rules",), True)


def test_a_missing_file_is_found_without_reading(fleet: Fleet) -> None:
    blob_of(fleet, code_blobs(fleet)["rules"]).unlink()
    (finding,) = fleet.verify()
    assert (finding.kind, finding.tasks) == ("missing", ("rules",))


def test_only_what_the_named_tasks_need_is_checked(fleet: Fleet) -> None:
    blob_of(fleet, code_blobs(fleet)["rules"]).unlink()
    assert list(fleet.verify(["poems", "silent"])) == []
    assert [finding.kind for finding in fleet.verify(["RULES"])] == ["missing"]
    with pytest.raises(TaskNotFound) as error:
        list(fleet.verify(["rule"]))
    assert error.value.hint == "did you mean 'rules'?"


def test_a_damaged_generator_concerns_every_task(fleet: Fleet) -> None:
    damage(blob_of(fleet, fleet.generators()[0].record.blob))
    (finding,) = fleet.verify(read_data=True)
    assert set(finding.tasks) == {"poems", "rules", "silent"}


def test_what_a_crash_leaves_is_told_but_is_no_problem(fleet: Fleet) -> None:
    (fleet.path / "tmp" / "left-over").write_bytes(b"half a file")
    (finding,) = fleet.verify()
    assert (finding.kind, finding.is_problem) == ("leftover", False)
    assert is_sound(fleet)


def test_a_wrong_row_is_found_and_ends_the_check_of_what_rows_say(fleet: Fleet) -> None:
    with closing(sqlite3.connect(fleet.path / "registry.db", isolation_level=None)) as rows:
        rows.execute("UPDATE tasks SET pinned = 1 WHERE name = 'rules'")
    (finding,) = fleet.verify(read_data=True, decode=True)
    assert (finding.kind, finding.tasks, finding.is_problem) == ("row", ("rules",), True)
    assert fleet.load("poems").modules


@pytest.mark.parametrize(
    ("change", "fact"),
    [
        ("dw_error = dw_error / 4", "is recorded"),
        ("blob_id = (SELECT blob_id FROM generators), bits = 0", "does not have the kind recorded in its row, code"),
    ],
)
def test_a_code_that_is_not_what_its_row_says_is_found(fleet: Fleet, change: str, fact: str) -> None:
    assert list(fleet.verify(decode=True)) == []
    with rewriting(fleet.path / "registry.db") as rows:
        rows.execute(f"UPDATE codes SET {change} WHERE task_id = (SELECT id FROM tasks WHERE name = 'rules')")
        rows.execute("UPDATE codes SET bits = 8.0 * (SELECT size FROM blobs WHERE id = blob_id)")
    found = [finding for finding in fleet.verify(read_data=True, decode=True) if "rules" in finding.tasks]
    assert any(fact in finding.message for finding in found)


def test_checking_changes_no_byte(fleet: Fleet) -> None:
    damage(blob_of(fleet, code_blobs(fleet)["rules"]))
    before = files_of(fleet.path)
    list(fleet.verify(read_data=True))
    assert files_of(fleet.path) == before


def test_a_repaired_original_is_restored_by_an_ingest(fleet: Fleet, loras: Path) -> None:
    weights = fleet.show("rules").final.weights
    damage(blob_of(fleet, weights))
    with pytest.raises(DamagedStore):
        fleet.load("rules")
    ((finding, place),) = fleet.repair()
    assert (finding.digest, Path(place).parent.name, has_blob(fleet, weights)) == (weights, "quarantine", False)
    fleet.ingest([loras / "rules"])
    assert is_sound(fleet)
    assert fleet.load("rules", source="original").layout


def test_a_sound_store_has_nothing_to_repair(fleet: Fleet) -> None:
    before = files_of(fleet.path)
    assert fleet.repair() == []
    assert files_of(fleet.path) == before


def test_pruning_a_tidy_store_changes_no_byte(fleet: Fleet) -> None:
    before = files_of(fleet.path)
    report = fleet.prune(grace=0)
    assert (report.blobs, report.temporary_files, report.freed_bytes) == (0, 0, 0)
    assert files_of(fleet.path) == before


def test_what_is_pruned_is_what_the_disk_gets_back(fleet: Fleet) -> None:
    fleet.remove(["rules"])
    (fleet.path / "tmp" / "left-over").write_bytes(b"half a file")
    before = size_of(fleet.path / "blobs") + size_of(fleet.path / "tmp")
    report = fleet.prune(grace=0, empty_quarantine=True)
    assert report.temporary_files == 1
    assert report.freed_bytes == before - size_of(fleet.path / "blobs") - size_of(fleet.path / "tmp")
    assert list(fleet.verify(read_data=True)) == []


def test_a_dry_run_of_prune_changes_no_byte(fleet: Fleet) -> None:
    fleet.remove(["rules"])
    before = files_of(fleet.path)
    planned = fleet.prune(grace=0, dry_run=True)
    assert planned.blobs > 0
    assert files_of(fleet.path) == before


def test_young_files_are_spared(fleet: Fleet) -> None:
    fleet.remove(["rules"])
    young = fleet.path / "tmp" / "young"
    old = fleet.path / "tmp" / "old"
    for path in (young, old):
        path.write_bytes(b"half a file")
    os.utime(old, (time.time() - 7200, time.time() - 7200))
    fleet.prune()
    assert (young.exists(), old.exists()) == (True, False)


def test_pruning_waits_for_whoever_uses_the_store(fleet: Fleet) -> None:
    fleet.remove(["rules"])
    findings = fleet.verify()  # an iterator that has begun keeps the store open
    (fleet.path / "tmp" / "left-over").write_bytes(b"x")
    next(findings)
    with pytest.raises(StoreLocked) as error:
        Fleet(fleet.path, lock_timeout=0).prune(grace=0)
    assert "--lock-timeout" in str(error.value.hint)
    findings.close()  # type: ignore[attr-defined]
    assert Fleet(fleet.path, lock_timeout=0).prune(grace=0).temporary_files == 1


def test_without_a_store_there_is_nothing_to_maintain(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path / "nowhere")
    for work in (lambda: list(fleet.verify()), fleet.repair, fleet.prune):
        with pytest.raises(StoreNotFound):
            work()
    assert not fleet.path.exists()


def test_the_doctor_of_no_store_says_what_makes_one(tmp_path: Path) -> None:
    checks = {check.name: check for check in Fleet(tmp_path / "nowhere").doctor()}
    assert checks["store"].value == "none yet; run `icm ingest` to create it"
    assert not (tmp_path / "nowhere").exists()


def test_the_doctor_reports_a_damaged_database_as_a_problem(fleet: Fleet) -> None:
    before = {check.name: check.problem for check in fleet.doctor()}
    (fleet.path / "registry.db").write_bytes(b"not a database" * 100)
    after = {check.name: check.problem for check in fleet.doctor()}
    assert (before["store"], before["schema"]) == (None, None)
    assert after["schema"]
