"""What all methods of `Fleet` share: the listener, the path, the locks and the selection of tasks."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from icmlora import Cancelled, Event, Fleet, IcmError, Progress
from icmlora.errors import DeviceUnavailable
from icmlora.fleet.encode.report import TaskEncoded
from registry.errors import NotAStore
from tests.icmlora.fleet.stores import TASKS, code_blobs, copy_of, equal, files_of, is_sound, stop_after

Work = Callable[[Fleet], object]
SELECTING: dict[str, Work] = {
    "encode": lambda fleet: fleet.encode(["poems", "poem"], max_error=0.32),
    "evaluate": lambda fleet: fleet.evaluate(["poems", "poem"], device="cpu"),
    "evict": lambda fleet: fleet.evict(["poems", "poem"], max_error=0.95),
    "extract_vectors": lambda fleet: fleet.extract_vectors(["poems", "poem"], device="cpu", again=True),
    "export_bundle": lambda fleet: fleet.export_bundle(fleet.path.parent / "out.icm", ["poems", "poem"]),
    "edit": lambda fleet: fleet.edit(["poems", "poem"], pinned=True),
    "remove": lambda fleet: fleet.remove(["poems", "poem"]),
    "verify": lambda fleet: fleet.verify(["poems", "poem"]),
}


@pytest.mark.parametrize("name", list(SELECTING))
def test_one_unknown_task_stops_everything_with_a_suggestion(fleet: Fleet, name: str) -> None:
    before = files_of(fleet.path)
    with pytest.raises(IcmError) as error:
        SELECTING[name](fleet)
    assert (error.value.hint, files_of(fleet.path)) == ("did you mean 'poems'?", before)


def test_an_error_of_the_listener_comes_through_and_lets_the_locks_go(fleet: Fleet) -> None:
    def fail(event: Event) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        Fleet(fleet.path, on_event=fail).encode(max_error=0.32)
    assert Fleet(fleet.path, lock_timeout=0).prune(grace=0).blobs == 0
    assert is_sound(fleet)


def test_a_stop_says_that_what_was_finished_is_kept(fleet: Fleet) -> None:
    with pytest.raises(Cancelled, match="completed work is kept"):
        Fleet(fleet.path, on_event=stop_after(1)).encode(max_error=0.32)


def test_a_fleet_can_be_stopped_at_each_of_its_first_events_and_goes_on(fleet: Fleet, tmp_path: Path) -> None:
    finished = copy_of(fleet.path, tmp_path / "undisturbed")
    finished.encode(["silent", "poems"], max_error=0.17)
    for count in range(1, 6):
        with pytest.raises(Cancelled):
            Fleet(fleet.path, on_event=stop_after(count)).encode(["silent", "poems"], max_error=0.17)
        assert is_sound(fleet)
    fleet.encode(["silent", "poems"], max_error=0.17)
    assert code_blobs(fleet) == code_blobs(finished)


@pytest.mark.slow
def test_progress_never_goes_back_and_ends_at_the_total(learned: Fleet) -> None:
    heard: list[Event] = []
    Fleet(learned.path, on_event=heard.append).evaluate(sources=[], device="cpu")
    steps = [event for event in heard if isinstance(event, Progress)]
    done = [step.done for step in steps]
    assert done == sorted(done)
    assert (steps[0], steps[-1].done, steps[-1].total) == (Progress(0, 3), 3, 3)


def test_two_fleet_objects_see_what_the_other_one_did(fleet: Fleet) -> None:
    other = Fleet(str(fleet.path))
    other.edit(["silent"], pinned=True)
    assert fleet.show("silent").task.pinned
    fleet.remove(["rules"])
    assert [row.name for row in other.tasks()] == ["poems", "silent"]


def test_one_fleet_object_may_be_used_while_it_works(fleet: Fleet) -> None:
    seen: list[int] = []
    working = Fleet(fleet.path, on_event=lambda event: seen.append(len(working.tasks())))
    working.encode(["silent"], max_error=0.32)
    assert set(seen) == {3}


def test_two_stores_do_not_know_of_each_other(fleet: Fleet, tmp_path: Path) -> None:
    copy = copy_of(fleet.path, tmp_path / "copy")
    copy.remove(["poems"])
    assert len(fleet.tasks()) == 3


def test_a_moved_store_is_the_same_store(fleet: Fleet, tmp_path: Path) -> None:
    before = fleet.load("rules", source="code")
    moved = Fleet(fleet.path.rename(tmp_path / "a new, better place"))
    assert equal(moved.load("rules", source="code"), before)
    assert moved.evict(["rules"], max_error=0.7).gone


def test_a_relative_path_is_that_of_the_call(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(fleet.path.parent)
    assert [row.name for row in Fleet(fleet.path.name).tasks()] == TASKS


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_store_that_cannot_be_written_can_be_read(fleet: Fleet, tmp_path: Path) -> None:
    fleet.path.chmod(0o555)
    try:
        assert fleet.materialize("poems", tmp_path / "out", source="code").source == "code"
    finally:
        fleet.path.chmod(0o755)


@pytest.mark.parametrize("name", ["tasks", "stats", "base_models", "generators"])
def test_a_folder_of_other_files_is_not_a_store(tmp_path: Path, name: str) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"cat")
    with pytest.raises(IcmError):
        getattr(Fleet(tmp_path / "photos"), name)()
    assert files_of(tmp_path / "photos") == {"cat.jpg": b"cat"}


def test_a_folder_of_other_files_does_not_become_a_store(tmp_path: Path, loras: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"cat")
    with pytest.raises(NotAStore, match=r"cat\.jpg"):
        Fleet(tmp_path / "photos").ingest([loras])
    assert files_of(tmp_path / "photos") == {"cat.jpg": b"cat"}


@pytest.mark.parametrize("method", ["train", "update", "train_few_shot", "extract_vectors", "evaluate"])
def test_a_device_is_checked_before_the_store_is_opened(tmp_path: Path, method: str) -> None:
    with pytest.raises(DeviceUnavailable, match="unknown device 'gpu'"):
        getattr(Fleet(tmp_path / "nowhere"), method)(device="gpu")


@pytest.mark.slow
def test_another_process_sees_who_holds_the_base_model(fleet: Fleet) -> None:
    code = (
        "from icmlora import Fleet, StoreLocked\n"
        f"try: Fleet({str(fleet.path)!r}, lock_timeout=0).rollback('0000')\n"
        f"except StoreLocked as error: print(error)\n"
        "except Exception as error: print(type(error).__name__)\n"
    )
    digits = fleet.generators()[0].generator.blob[:8]
    said: list[str] = []

    def listen(event: Event) -> None:
        if isinstance(event, TaskEncoded):
            command = [sys.executable, "-c", code.replace("0000", digits)]
            said.append(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    Fleet(fleet.path, command="nightly encode", on_event=listen).encode(["silent"], max_error=0.32)
    assert f"in use by process {os.getpid()}: nightly encode" in said[0]
