"""`Fleet.verify`, `repair`, `prune` and `doctor`."""

from __future__ import annotations

import os
import sqlite3
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from icmlora import DamagedStore, Fleet, StoreLocked, StoreNotFound, TaskNotFound
from registry.manifests import File
from tests.icmlora.fleet.stores import blob_of, code_blobs, damage, files_of, has_blob, is_sound, size_of


def test_a_trained_store_is_sound(fleet: Fleet) -> None:
    assert fleet.verify(read_data=True) == []


def test_changed_bytes_are_found_only_by_reading(fleet: Fleet) -> None:
    code = code_blobs(fleet)["rules"]
    damage(blob_of(fleet, code))
    assert fleet.verify() == []
    (finding,) = fleet.verify(read_data=True)
    assert (finding.kind, finding.digest, finding.tasks, finding.is_problem) == ("digest", code, ("rules",), True)


def test_a_missing_file_is_found_without_reading(fleet: Fleet) -> None:
    blob_of(fleet, code_blobs(fleet)["rules"]).unlink()
    (finding,) = fleet.verify()
    assert (finding.kind, finding.tasks) == ("missing", ("rules",))


def test_only_what_the_named_tasks_need_is_checked(fleet: Fleet) -> None:
    blob_of(fleet, code_blobs(fleet)["rules"]).unlink()
    assert fleet.verify(["poems", "silent"]) == []
    assert [finding.kind for finding in fleet.verify(["RULES"])] == ["missing"]
    with pytest.raises(TaskNotFound) as error:
        fleet.verify(["rule"])
    assert error.value.hint == "did you mean 'rules'?"


def test_a_damaged_generator_concerns_every_task(fleet: Fleet) -> None:
    damage(blob_of(fleet, fleet.generators()[0].generator.blob))
    (finding,) = fleet.verify(read_data=True)
    assert set(finding.tasks) == {"poems", "rules", "silent"}


def test_what_a_crash_leaves_is_told_but_is_no_problem(fleet: Fleet) -> None:
    (fleet.path / "tmp" / "left-over").write_bytes(b"half a file")
    (finding,) = fleet.verify()
    assert (finding.kind, finding.is_problem) == ("leftover", False)
    assert is_sound(fleet)


def test_a_wrong_row_is_found_and_ends_the_check(fleet: Fleet) -> None:
    with closing(sqlite3.connect(fleet.path / "registry.db", isolation_level=None)) as rows:
        rows.execute("UPDATE refs SET pinned = 1 WHERE name = 'rules'")
    (finding,) = fleet.verify(read_data=True, decode=True)
    assert (finding.kind, finding.is_problem) == ("row", True)
    assert fleet.load("poems").modules
    assert fleet.rebuild_database().tasks == 3
    assert fleet.verify(read_data=True, decode=True) == []


def test_a_code_with_another_error_than_recorded_is_found(fleet: Fleet) -> None:
    assert fleet.verify(decode=True) == []
    with fleet.context.open() as store:
        store.update("rules", lambda task: replace(task, code=replace(task.code, squared_error=1e-6)))  # type: ignore[type-var]
    (finding,) = fleet.verify(decode=True)
    assert (finding.kind, finding.tasks, finding.is_problem) == ("code", ("rules",), True)
    assert "is recorded" in finding.message


def test_a_code_that_cannot_be_decoded_is_found(fleet: Fleet) -> None:
    with fleet.context.open() as store:
        blob = File(store.blobs.put(b"not a code"), len(b"not a code"))
        store.update("rules", lambda task: replace(task, code=replace(task.code, blob=blob)))  # type: ignore[type-var]
    (finding,) = [finding for finding in fleet.verify(decode=True) if finding.is_problem]
    assert (finding.kind, finding.tasks) == ("code", ("rules",))
    assert "cannot be decoded" in finding.message


def test_checking_changes_no_byte(fleet: Fleet) -> None:
    damage(blob_of(fleet, code_blobs(fleet)["rules"]))
    before = files_of(fleet.path)
    fleet.verify(read_data=True)
    assert files_of(fleet.path) == before


def test_a_repaired_original_is_restored_by_an_ingest(fleet: Fleet, loras: Path) -> None:
    weights = fleet.show("rules").task.final.weights
    blob_of(fleet, weights).chmod(0o644)
    blob_of(fleet, weights).write_bytes(bytes(weights.size))
    with pytest.raises(DamagedStore):
        fleet.load("rules")
    ((finding, result),) = fleet.repair()
    assert (finding.digest, "moved to" in result, has_blob(fleet, weights)) == (weights, True, False)
    fleet.ingest([loras / "rules"])
    assert is_sound(fleet)
    assert fleet.load("rules", source="original").layout


def test_a_flipped_bit_is_corrected(fleet: Fleet) -> None:
    damage(blob_of(fleet, code_blobs(fleet)["rules"]))
    ((_, result),) = fleet.repair()
    assert result.startswith("corrected one flipped bit")
    assert is_sound(fleet)


def test_a_sound_store_has_nothing_to_repair(fleet: Fleet) -> None:
    before = files_of(fleet.path)
    assert fleet.repair() == []
    assert files_of(fleet.path) == before


def test_pruning_a_tidy_store_changes_no_byte(fleet: Fleet) -> None:
    fleet.prune(grace=0)
    before = files_of(fleet.path)
    report = fleet.prune(grace=0)
    assert (report.blobs, report.temporary_files, report.freed_bytes) == (0, 0, 0)
    assert files_of(fleet.path) == before


def size_of_files(fleet: Fleet) -> int:
    return sum(size_of(fleet.path / name) for name in ("blobs", "manifests", "tmp"))


def remove(fleet: Fleet) -> None:
    """Remove a task while the store is in use, so that its bytes stay."""
    with fleet.context.open(read_only=True):
        assert Fleet(fleet.path, lock_timeout=0).remove(["rules"]).freed is None


def test_what_is_pruned_is_what_the_disk_gets_back(fleet: Fleet) -> None:
    remove(fleet)
    (fleet.path / "tmp" / "left-over").write_bytes(b"half a file")
    before = size_of_files(fleet)
    report = fleet.prune(grace=0)
    assert report.temporary_files == 1
    assert report.freed_bytes == before - size_of_files(fleet)
    assert fleet.verify(read_data=True) == []


def test_a_dry_run_of_prune_changes_no_byte(fleet: Fleet) -> None:
    remove(fleet)
    before = files_of(fleet.path)
    planned = fleet.prune(grace=0, dry_run=True)
    assert planned.blobs > 0
    assert files_of(fleet.path) == before


def test_young_files_are_spared(fleet: Fleet) -> None:
    young = fleet.path / "tmp" / "young"
    old = fleet.path / "tmp" / "old"
    for path in (young, old):
        path.write_bytes(b"half a file")
    os.utime(old, (time.time() - 7200, time.time() - 7200))
    fleet.prune()
    assert (young.exists(), old.exists()) == (True, False)


def test_pruning_waits_for_whoever_uses_the_store(fleet: Fleet) -> None:
    (fleet.path / "tmp" / "left-over").write_bytes(b"x")
    with fleet.context.open(read_only=True), pytest.raises(StoreLocked) as error:
        Fleet(fleet.path, lock_timeout=0).prune(grace=0)
    assert "--lock-timeout" in str(error.value.hint)
    assert Fleet(fleet.path, lock_timeout=0).prune(grace=0).temporary_files == 1


def test_without_a_store_there_is_nothing_to_maintain(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path / "nowhere")
    for work in (lambda: fleet.verify(), fleet.repair, fleet.prune):
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
    assert (before["store"], before["database"]) == (None, None)
    assert "icm verify --repair" in str(after["store"])
