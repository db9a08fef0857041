"""`Fleet.evict(copies=N)`: what counts as a copy of an original, and what does not."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from icmlora import BundleError, DataError, Event, Fleet, UnsafeInput
from icmlora.fleet.evict import copies
from icmlora.fleet.evict.types import TaskEvicted
from icmlora.io.files import HashedFile
from registry.errors import StoreLocked
from registry.records import Eviction
from registry.store import Store
from registry.tables.eviction import Originals
from tests.cli.tiny_fleet import write_lora
from tests.icmlora.fleet.stores import blob_of, copy_of, damage, is_sound

WEIGHTS = "adapter_model.safetensors"


def evict(
    fleet: Fleet, places: Sequence[Path], task: str = "rules", needed: int | None = None, **options: bool
) -> TaskEvicted:
    """Evict a task if it has copies, and return what became of it."""
    (done,) = fleet.evict([task], max_error=0.7, copies=needed, copy_paths=places, **options).tasks  # type: ignore[arg-type]
    return done


def is_gone(fleet: Fleet, task: str = "rules") -> bool:
    return fleet.show(task).final.is_evicted


@pytest.fixture
def backup(mixed_template: Path, tmp_path: Path) -> Path:
    """A copy of the folder that the fleet was ingested from."""
    return Path(shutil.copytree(mixed_template / "loras", tmp_path / "backup"))


def test_a_folder_with_the_same_bytes_is_a_copy(fleet: Fleet, backup: Path) -> None:
    done = evict(fleet, [backup])
    assert (done.status, [(copy.path, copy.kind) for copy in done.copies]) == ("evicted", [(str(backup), "folder")])
    assert (is_gone(fleet), is_sound(fleet)) == (True, True)


def test_the_folder_that_it_came_from_is_a_copy_as_long_as_it_stays(fleet: Fleet, own_loras: Path) -> None:
    done = evict(fleet, [own_loras], placeholder=True)
    assert (done.status, is_gone(fleet)) == ("kept", False)
    assert "only the files that are to be replaced" in str(done.reason)
    assert (own_loras / "rules" / WEIGHTS).exists()
    assert evict(fleet, [own_loras]).status == "evicted"


def test_another_store_is_a_copy_if_it_keeps_the_original(fleet: Fleet, tmp_path: Path) -> None:
    other = copy_of(fleet.path, tmp_path / "other")
    assert [copy.kind for copy in evict(fleet, [other.path], dry_run=True).copies] == ["store"]
    other.evict(["rules"], max_error=0.7)
    done = evict(fleet, [other.path])
    assert (done.status, "evicted there too" in str(done.reason), is_gone(fleet)) == ("kept", True, False)


def test_another_store_is_held_once_this_one_is_alone_and_not_while_it_waits_for_that(
    fleet: Fleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, real = copy_of(fleet.path, tmp_path / "other"), Originals.evict

    def observed(self: Originals, order: Eviction, confirm: Callable[[], AbstractContextManager[object]]) -> int:
        @contextmanager
        def confirmed() -> Iterator[None]:
            with confirm():
                with Store.open(other.path, lock_timeout=0) as opened, pytest.raises(StoreLocked):
                    opened.prune()
                yield

        with Store.open(other.path, lock_timeout=0) as opened:
            opened.prune()
        return real(self, order, confirmed)

    monkeypatch.setattr(Originals, "evict", observed)
    assert evict(fleet, [other.path]).status == "evicted"


def test_a_store_that_somebody_has_alone_does_not_count_and_is_not_waited_for(
    fleet: Fleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, real = copy_of(fleet.path, tmp_path / "other"), Originals.evict

    def beside_another(self: Originals, order: Eviction, confirm: Callable[[], AbstractContextManager[object]]) -> int:
        with Store.open(other.path) as opened, opened._lock.exclusive():
            return real(self, order, confirm)

    monkeypatch.setattr(Originals, "evict", beside_another)
    done = evict(fleet, [other.path])
    assert (done.status, "is in use" in str(done.reason), is_gone(fleet)) == ("kept", True, False)


def test_a_bundle_is_a_copy_of_the_code(fleet: Fleet, tmp_path: Path) -> None:
    fleet.export_bundle(tmp_path / "fleet.icm")
    done = evict(fleet, [tmp_path / "fleet.icm"])
    assert (done.status, [copy.kind for copy in done.copies]) == ("evicted", ["bundle"])


@pytest.mark.slow
def test_a_bundle_with_another_code_is_none(fleet: Fleet, tmp_path: Path) -> None:
    fleet.export_bundle(tmp_path / "fleet.icm")
    fleet.encode(["rules"], max_error=0.1)
    done = evict(fleet, [tmp_path / "fleet.icm"])
    assert (done.status, "its code there is another one" in str(done.reason)) == ("kept", True)


def test_a_bundle_does_not_count_where_a_residual_is_relied_on(fleet: Fleet, tmp_path: Path) -> None:
    fleet.encode(["rules"], max_error=0.1, residual=True)
    fleet.export_bundle(tmp_path / "fleet.icm")
    done = evict(fleet, [tmp_path / "fleet.icm"])
    assert (done.status, "residual" in str(done.reason)) == ("kept", True)


def test_a_bundle_has_no_checkpoints_so_those_stay(fleet: Fleet, tmp_path: Path) -> None:
    fleet.export_bundle(tmp_path / "fleet.icm")
    report = fleet.evict(["poems"], max_error=0.7, copy_paths=[tmp_path / "fleet.icm"])
    (done,) = report.tasks
    assert (done.status, done.adapters, report.partly) == ("evicted", 1, True)
    assert "2 checkpoints kept" in str(done.reason)
    assert [row.is_evicted for row in fleet.show("poems").adapters] == [False, False, True]


def test_checkpoints_go_with_their_copies(fleet: Fleet, backup: Path) -> None:
    assert evict(fleet, [backup], "poems").adapters == 3


def test_too_few_copies_keep_the_original_and_name_what_was_found(fleet: Fleet, backup: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    done = evict(fleet, [backup, tmp_path / "empty"], needed=2)
    assert done.reason == f"1 of 2 copies found (in {backup}); {tmp_path / 'empty'}: it is not there"
    assert not is_gone(fleet)


@pytest.mark.parametrize("name", ["adapter_config.json", WEIGHTS])
def test_other_bytes_are_no_copy(fleet: Fleet, backup: Path, name: str) -> None:
    damage(backup / "rules" / name)
    assert evict(fleet, [backup]).status == "kept"
    assert evict(fleet, [backup], "silent").status == "evicted"


def test_a_damaged_blob_in_another_store_is_no_copy(fleet: Fleet, tmp_path: Path) -> None:
    other = copy_of(fleet.path, tmp_path / "other")
    damage(blob_of(other, other.show("rules").final.weights))
    done = evict(fleet, [other.path])
    assert (done.status, "damaged" in str(done.reason)) == ("kept", True)


def test_two_paths_to_one_file_are_one_copy(fleet: Fleet, backup: Path, tmp_path: Path) -> None:
    shutil.copytree(backup, tmp_path / "linked", copy_function=os.link)
    (tmp_path / "symlink").symlink_to(backup)
    for other in (tmp_path / "linked", tmp_path / "symlink", backup, backup / "rules"):
        done = evict(fleet, [backup, other], needed=2)
        assert (done.status, f"the same file as in {backup}" in str(done.reason)) == ("kept", True)


@pytest.mark.slow
def test_two_folders_with_files_of_their_own_are_two_copies(fleet: Fleet, backup: Path, tmp_path: Path) -> None:
    shutil.copytree(backup, tmp_path / "second")
    assert len(evict(fleet, [backup, tmp_path / "second"], needed=2).copies) == 2


def test_a_link_to_the_stores_own_file_is_no_copy(fleet: Fleet, backup: Path) -> None:
    weights = backup / "rules" / WEIGHTS
    weights.unlink()
    weights.hardlink_to(blob_of(fleet, fleet.show("rules").final.weights))
    done = evict(fleet, [backup])
    assert (done.status, "link to the file in the store" in str(done.reason)) == ("kept", True)


def test_a_hard_linked_copy_of_the_store_is_no_copy(fleet: Fleet, tmp_path: Path) -> None:
    shutil.copytree(fleet.path, tmp_path / "other", copy_function=os.link)
    os.replace(shutil.copy(tmp_path / "other" / "registry.db", tmp_path / "db"), tmp_path / "other" / "registry.db")
    for lock in (tmp_path / "other").glob("lock*"):
        lock.unlink()
        lock.touch()
    done = evict(fleet, [tmp_path / "other"])
    assert (done.status, "link to the file in the store" in str(done.reason)) == ("kept", True)


def test_the_store_itself_is_refused_whatever_path_leads_there(fleet: Fleet, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(fleet.path)
    for place in (fleet.path, fleet.path / "blobs", tmp_path / "link"):
        with pytest.raises(DataError, match="the store itself"):
            evict(fleet, [place])
    assert not is_gone(fleet)


def test_a_place_that_is_not_there_is_refused_before_anything_goes(fleet: Fleet, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no bundle")
    for place, kind in ((tmp_path / "none", DataError), (tmp_path / "text", BundleError)):
        with pytest.raises(kind):
            evict(fleet, [place])
    with pytest.raises((UnsafeInput, DataError)):
        evict(fleet, [Path("/dev/null")])
    assert not is_gone(fleet)


def test_fewer_places_than_copies_is_refused(fleet: Fleet, backup: Path) -> None:
    with pytest.raises(DataError, match="2 copies asked for, but 1 place named"):
        evict(fleet, [backup], needed=2)


def test_a_damaged_bundle_is_refused_before_anything_goes(fleet: Fleet, tmp_path: Path) -> None:
    fleet.export_bundle(tmp_path / "fleet.icm")
    damage(tmp_path / "fleet.icm")
    with pytest.raises(BundleError, match="damaged"):
        evict(fleet, [tmp_path / "fleet.icm"])


def test_a_copy_that_goes_meanwhile_does_not_count_for_the_next_task(fleet: Fleet, backup: Path) -> None:
    def listen(event: Event) -> None:
        if isinstance(event, TaskEvicted) and event.task == "rules":
            shutil.rmtree(backup / "silent")

    report = Fleet(fleet.path, on_event=listen).evict(["rules", "silent"], max_error=0.7, copy_paths=[backup])
    assert [task.status for task in report.tasks] == ["evicted", "kept"]


@pytest.mark.slow
def test_a_copy_that_changes_after_it_was_hashed_is_hashed_again(
    fleet: Fleet, backup: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[str] = []
    real = copies.hash_regular

    def count(path: Path) -> HashedFile:
        hashed.append(path.name)
        return real(path)

    monkeypatch.setattr(copies, "hash_regular", count)
    shutil.copytree(backup / "rules", backup / "again")

    def listen(event: Event) -> None:
        if isinstance(event, TaskEvicted) and event.task == "rules":
            for name in ("rules", "again"):
                damage(backup / name / WEIGHTS)

    fleet.ingest([backup / "rules"], name="twin")
    fleet.update(device="cpu", steps=2)
    report = Fleet(fleet.path, on_event=listen).evict(["rules", "twin"], max_error=0.7, copy_paths=[backup])
    assert [task.status for task in report.tasks] == ["evicted", "kept"]


@pytest.mark.slow
def test_a_pickle_is_a_copy_of_what_was_made_of_it(fleet: Fleet, tmp_path: Path) -> None:
    folder = write_lora(tmp_path / "odes", seed=8)
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()
    fleet.ingest([folder], read_bin=True)
    fleet.update(device="cpu", steps=2)
    shutil.copytree(folder, tmp_path / "backup")
    assert evict(fleet, [tmp_path / "backup"], "odes").status == "evicted"


def test_placeholders_of_kept_originals_ask_for_copies_too(fleet: Fleet, own_loras: Path, backup: Path) -> None:
    places = [own_loras, backup]
    report = fleet.evict(["rules"], placeholder=True, keep_originals=True, copies=2, copy_paths=places)
    (task,) = report.tasks
    assert (task.status, "1 of 2 copies found" in str(task.reason)) == ("kept", True)
    assert (own_loras / "rules" / WEIGHTS).exists()
    assert fleet.evict(["rules"], placeholder=True, keep_originals=True, copy_paths=places).placeholders


def test_a_folder_of_an_evicted_task_asks_for_copies_too(fleet: Fleet, own_loras: Path, backup: Path) -> None:
    fleet.evict(["rules"], max_error=0.7)
    done = evict(fleet, [own_loras], placeholder=True)
    assert (done.status, [folder.status for folder in done.folders]) == ("known", ["left"])
    assert [folder.status for folder in evict(fleet, [backup], placeholder=True).folders] == ["replaced"]
