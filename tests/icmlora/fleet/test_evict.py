"""`Fleet.evict`, and pinning: which originals go, what that frees, and why others stay."""

from __future__ import annotations

from pathlib import Path

import pytest

from icmlora import Cancelled, DataError, Event, Fleet, TaskNotFound
from icmlora.fleet.encode.report import TaskEncoded
from icmlora.fleet.evict.types import EvictReport, TaskEvicted
from tests.icmlora.fleet.stores import (
    TASKS,
    blob_of,
    code_blobs,
    damage,
    equal,
    files_of,
    has_blob,
    is_sound,
    stop_after,
)


def blob_bytes(fleet: Fleet) -> int:
    return sum(path.stat().st_size for path in (fleet.path / "blobs").rglob("*") if path.is_file())


def gone(fleet: Fleet) -> list[str]:
    return [row.name for row in fleet.tasks() if row.evicted_at is not None]


@pytest.mark.parametrize(
    "limits", [{}, {"max_error": float("nan")}, {"min_gain": float("nan")}, {"max_error": float("inf")}]
)
def test_without_a_limit_nothing_is_deleted(fleet: Fleet, limits: dict[str, float]) -> None:
    before = files_of(fleet.path)
    with pytest.raises(DataError, match="limit"):
        fleet.evict(**limits)  # type: ignore[arg-type]
    assert files_of(fleet.path) == before


def test_what_is_freed_is_what_the_disk_gets_back(fleet: Fleet) -> None:
    before = blob_bytes(fleet)
    report = fleet.evict(max_error=0.7)
    assert report.freed == sum(task.freed for task in report.done) == before - blob_bytes(fleet)
    assert [task.adapters for task in report.gone] == [3, 1, 1]


def test_what_is_left_is_the_code(fleet: Fleet) -> None:
    expected = fleet.load("rules", source="code")
    fleet.evict(["rules"], max_error=0.7)
    assert equal(fleet.load("rules"), expected)
    assert (gone(fleet), is_sound(fleet)) == (["rules"], True)


@pytest.mark.slow
def test_the_report_names_the_code_that_is_left(fleet: Fleet) -> None:
    (task,) = fleet.evict(["rules"], max_error=0.7).done
    assert task.code_size == blob_of(fleet, code_blobs(fleet)["rules"]).stat().st_size
    code = fleet.show("rules").task.code
    assert code is not None
    assert task.squared_error == pytest.approx(code.squared_error)


def test_a_dry_run_reports_the_same_and_changes_no_byte(fleet: Fleet) -> None:
    before = files_of(fleet.path)
    planned = fleet.evict(max_error=0.45, dry_run=True)
    assert files_of(fleet.path) == before
    assert [task.status for task in planned.done] == ["kept", "would_evict", "would_evict"]
    done = fleet.evict(max_error=0.45)
    assert (done.freed, [task.task for task in done.gone]) == (planned.freed, [task.task for task in planned.gone])


@pytest.mark.usefixtures("two_threads")
def test_a_dry_run_on_two_processes_reports_what_one_process_reports(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    damage(blob_of(fleet, code_blobs(fleet)[TASKS[1]]))
    alone = fleet.evict(max_error=0.45, dry_run=True)
    monkeypatch.setattr("icmlora.fleet.evict.check._CHECKED_TOGETHER", 1)
    assert fleet.evict(max_error=0.45, dry_run=True) == alone


def test_a_code_that_misses_the_limit_keeps_its_original(fleet: Fleet) -> None:
    report = fleet.evict(["poems"], max_error=0.1)
    (task,) = report.kept
    assert (report.is_partial, report.freed, gone(fleet)) == (True, 0, [])
    assert "above the limit of 0.1" in str(task.reason)


@pytest.mark.slow
def test_a_second_call_has_nothing_to_do(fleet: Fleet) -> None:
    fleet.evict(max_error=0.7)
    before = files_of(fleet.path)
    report = fleet.evict(max_error=0.7)
    assert ({task.status for task in report.done}, report.freed, report.is_partial) == ({"known"}, 0, False)
    assert files_of(fleet.path) == before


@pytest.mark.slow
def test_checkpoints_can_go_alone(fleet: Fleet, loras: Path) -> None:
    report = fleet.evict(max_error=0.7, checkpoints_only=True)
    assert [(task.task, task.adapters) for task in report.gone] == [("poems", 2)]
    assert gone(fleet) == []
    poems = fleet.show("poems")
    assert [adapter.is_evicted for adapter in poems.task.adapters] == [True, True, False]
    assert (
        blob_of(fleet, poems.task.final.weights).read_bytes()
        == (loras / "poems" / "adapter_model.safetensors").read_bytes()
    )


def test_weights_that_another_task_needs_stay(fleet: Fleet, loras: Path) -> None:
    fleet.ingest([loras / "silent"], name="twin")
    (task,) = fleet.evict(["silent"], max_error=0.7).done
    assert (task.status, task.freed) == ("evicted", 0)
    assert has_blob(fleet, fleet.show("twin").task.final.weights)
    assert equal(fleet.load("twin"), fleet.load("twin", source="original"))


def test_a_task_without_a_code_is_kept(fleet: Fleet, loras: Path) -> None:
    fleet.ingest([loras / "silent"], name="twin")
    (task,) = fleet.evict(["twin"], max_error=0.7).done
    assert (task.status, task.code_size) == ("kept", None)
    assert "it has no code" in str(task.reason)


def test_a_damaged_code_keeps_its_original(fleet: Fleet) -> None:
    damage(blob_of(fleet, code_blobs(fleet)["poems"]))
    report = fleet.evict(max_error=0.7)
    assert [task.task for task in report.kept] == ["poems"]
    assert gone(fleet) == ["rules", "silent"]


@pytest.mark.slow
def test_a_gain_is_measured_before_the_original_goes(learned: Fleet) -> None:
    (task,) = learned.evict(["apples"], min_gain=0.9, device="cpu").done
    assert task.status == "evicted"
    assert task.retained_gain is not None
    assert task.retained_gain >= 0.9
    assert {row.source for row in learned.show("apples").task.measured} == {"base", "original", "code"}


@pytest.mark.slow
def test_a_gain_that_is_too_small_keeps_the_original(learned: Fleet) -> None:
    (task,) = learned.evict(["ships"], min_gain=0.999, device="cpu").done
    assert (task.status, gone(learned)) == ("kept", [])
    assert "below the limit of 0.999" in str(task.reason)


@pytest.mark.slow
def test_a_stopped_eviction_is_finished_by_the_same_call(fleet: Fleet) -> None:
    with pytest.raises(Cancelled) as stopped:
        Fleet(fleet.path, on_event=stop_after(2, TaskEvicted)).evict(max_error=0.7)
    assert isinstance(stopped.value.report, EvictReport)
    assert [task.task for task in stopped.value.report.gone] == gone(fleet) == ["poems", "rules"]
    assert is_sound(fleet)
    assert [task.status for task in fleet.evict(max_error=0.7).done] == ["known", "known", "evicted"]


@pytest.mark.slow
def test_a_dry_run_does_not_wait_for_a_job(fleet: Fleet) -> None:
    other, planned = Fleet(fleet.path, lock_timeout=0), list[str]()

    def listen(event: Event) -> None:
        if isinstance(event, TaskEncoded):
            planned.extend(task.status for task in other.evict(["rules"], max_error=0.7, dry_run=True).done)

    Fleet(fleet.path, on_event=listen).encode(["silent"], max_error=0.1)
    assert planned == ["would_evict"]


def test_a_pinned_task_that_is_named_makes_the_report_partial(fleet: Fleet) -> None:
    fleet.edit(["silent", "SILENT"], pinned=True)
    assert fleet.evict(max_error=0.7, dry_run=True).is_partial is False
    report = fleet.evict(["silent"], max_error=0.7)
    assert (report.done[0].status, report.is_partial, gone(fleet)) == ("pinned", True, [])


@pytest.mark.slow
def test_pinning_is_undone_by_unpinning(fleet: Fleet) -> None:
    assert [task.name for task in fleet.edit(["Silent", "poems"], pinned=True).tasks] == ["silent", "poems"]
    assert [row.name for row in fleet.tasks() if row.pinned] == ["poems", "silent"]
    fleet.edit(["silent", "poems"], pinned=False)
    assert [task.task for task in fleet.evict(max_error=0.7).gone] == TASKS


def test_pinning_what_is_evicted_says_so(fleet: Fleet) -> None:
    fleet.evict(["silent"], max_error=0.7)
    assert fleet.edit(["silent", "poems"], pinned=True).evicted == ["silent"]


def test_an_unknown_name_is_refused_with_the_closest(fleet: Fleet) -> None:
    for pinned in (True, False):
        with pytest.raises(TaskNotFound) as error:
            fleet.edit(["rule"], pinned=pinned)
        assert error.value.matches[0] == "rules"
