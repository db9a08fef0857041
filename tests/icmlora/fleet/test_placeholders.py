"""`Fleet.evict(placeholder=True)`: what gives way to a placeholder in the user's folders, and what stays."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from safetensors.torch import load_file

from icmlora import DataError, Fleet
from icmlora.fleet.evict import check, placeholders
from icmlora.fleet.evict.types import FolderReplaced
from icmlora.formats.discovery.placeholder import PLACEHOLDER_NAME, read_placeholder
from tests.cli.tiny_fleet import write_lora
from tests.icmlora.fleet.stores import TASKS, blob_of, code_blobs, damage, files_of, is_sound

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def folder_of(fleet: Fleet, task: str, **options: Any) -> FolderReplaced:
    """Replace the final adapter of a task, whose original the store keeps, and return what became of its folder."""
    (done,) = fleet.evict([task], placeholder=True, keep_originals=True, **options).done
    return done.folders[-1]


def gone(fleet: Fleet) -> list[str]:
    return [row.name for row in fleet.tasks() if row.evicted_at is not None]


def test_the_adapter_gives_way_and_everything_else_stays(fleet: Fleet, own_loras: Path) -> None:
    before = names_in(own_loras / "poems")
    (own_loras / "poems" / "optimizer.pt").write_bytes(b"state")
    fleet.evict(["poems"], max_error=0.7, placeholder=True)
    assert names_in(own_loras / "poems") == (before - {CONFIG, WEIGHTS}) | {PLACEHOLDER_NAME, "optimizer.pt"}
    assert (gone(fleet), is_sound(fleet)) == (["poems"], True)


def test_a_folder_that_is_marked_as_read_only_stays_as_it_is(fleet: Fleet, own_loras: Path) -> None:
    before = files_of(own_loras / "rules")
    (own_loras / "rules").chmod(0o555)
    found = folder_of(fleet, "rules")
    (own_loras / "rules").chmod(0o755)
    assert (found.status, found.reason) == ("left", "its folder is marked as read-only")
    assert files_of(own_loras / "rules") == before


def test_the_placeholder_names_task_store_and_digests(fleet: Fleet, own_loras: Path) -> None:
    sizes = {name: (own_loras / "rules" / name).stat().st_size for name in (CONFIG, WEIGHTS)}
    fleet.evict(["rules"], max_error=0.7, placeholder=True)
    found = read_placeholder(own_loras / "rules" / PLACEHOLDER_NAME)
    task = fleet.show("rules").task
    assert (found.task, found.store, found.is_final) == ("rules", str(fleet.path), True)
    assert (found.weights, found.config) == (task.final.weights, task.final.config)
    assert {file.name: file.stamp.size for file in found.files} == sizes
    assert task.code is not None
    assert found.code is not None
    assert (found.code.code.digest, found.code.generator.digest) == (task.code.blob, task.code.generator)


def test_what_is_freed_is_reported_apart_from_the_store(fleet: Fleet, own_loras: Path) -> None:
    size = sum((own_loras / "rules" / name).stat().st_size for name in (CONFIG, WEIGHTS))
    weights = fleet.show("rules").task.final.weights.size
    report = fleet.evict(["rules"], max_error=0.7, placeholder=True)
    assert (report.freed, report.freed_in_folders) == (weights, size)


@pytest.mark.slow
def test_a_dry_run_says_the_same_and_touches_no_file(fleet: Fleet, own_loras: Path) -> None:
    before = files_of(own_loras) | files_of(fleet.path)
    planned = fleet.evict(max_error=0.7, placeholder=True, dry_run=True)
    assert files_of(own_loras) | files_of(fleet.path) == before
    done = fleet.evict(max_error=0.7, placeholder=True)
    assert planned.freed_in_folders == done.freed_in_folders > 0
    assert [folder.status for folder in planned.folders] == ["would_replace"] * 3
    assert [folder.status for folder in done.folders] == ["replaced"] * 3


def test_a_checkpoint_stays_in_its_folder_when_its_original_goes(fleet: Fleet, own_loras: Path) -> None:
    fleet.evict(["poems"], max_error=0.7, placeholder=True)
    assert names_in(own_loras / "poems" / "checkpoint-10") == {CONFIG, WEIGHTS}


def test_with_originals_kept_checkpoints_give_way_too_and_the_store_loses_nothing(
    fleet: Fleet, own_loras: Path
) -> None:
    before = files_of(fleet.path)
    report = fleet.evict(placeholder=True, keep_originals=True)
    assert [(task.task, task.status, task.adapters) for task in report.done] == [
        ("poems", "replaced", 3),
        ("rules", "replaced", 1),
        ("silent", "replaced", 1),
    ]
    assert files_of(fleet.path) == before
    assert names_in(own_loras / "poems" / "checkpoint-10") == {PLACEHOLDER_NAME}


def test_checkpoints_alone_can_give_way(fleet: Fleet, own_loras: Path) -> None:
    fleet.evict(placeholder=True, keep_originals=True, checkpoints_only=True)
    assert WEIGHTS in names_in(own_loras / "poems")
    assert names_in(own_loras / "poems" / "checkpoint-20") == {PLACEHOLDER_NAME}


@pytest.mark.slow
def test_a_task_that_was_evicted_before_gives_way_too(fleet: Fleet, own_loras: Path) -> None:
    fleet.evict(["rules"], max_error=0.7)
    (task,) = fleet.evict(["rules"], max_error=0.7, placeholder=True).done
    assert (task.status, task.folders[0].status) == ("known", "replaced")
    assert PLACEHOLDER_NAME in names_in(own_loras / "rules")


def test_a_limit_also_counts_for_what_was_evicted_before(fleet: Fleet, own_loras: Path) -> None:
    fleet.evict(["rules"], max_error=0.7)
    for limit in ({"max_error": 0.01}, {"min_gain": 0.5}):
        report = fleet.evict(["rules"], placeholder=True, **limit)  # type: ignore[arg-type]
        assert (report.is_partial, [folder.status for folder in report.folders]) == (True, ["left"])
    assert WEIGHTS in names_in(own_loras / "rules")


def test_a_damaged_code_leaves_the_folder_of_an_evicted_task(fleet: Fleet, own_loras: Path) -> None:
    fleet.evict(["rules"], max_error=0.7)
    damage(blob_of(fleet, code_blobs(fleet)["rules"]))
    (task,) = fleet.evict(["rules"], max_error=0.7, placeholder=True).done
    assert (task.folders[0].status, "damaged" in str(task.folders[0].reason)) == ("left", True)
    assert WEIGHTS in names_in(own_loras / "rules")


def test_a_damaged_original_leaves_the_folder(fleet: Fleet, own_loras: Path) -> None:
    damage(blob_of(fleet, fleet.show("rules").task.final.weights))
    folder = folder_of(fleet, "rules")
    assert (folder.status, "damaged" in str(folder.reason)) == ("left", True)
    assert WEIGHTS in names_in(own_loras / "rules")


def test_a_code_that_misses_the_limit_leaves_the_folder(fleet: Fleet, own_loras: Path) -> None:
    report = fleet.evict(["poems"], max_error=0.1, placeholder=True)
    assert (report.done[0].status, report.folders) == ("kept", [])
    assert WEIGHTS in names_in(own_loras / "poems")


def test_a_pinned_task_is_not_touched(fleet: Fleet, own_loras: Path) -> None:
    fleet.edit(["rules"], pinned=True)
    assert fleet.evict(["rules"], placeholder=True, keep_originals=True).done[0].status == "pinned"
    assert WEIGHTS in names_in(own_loras / "rules")


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_file_that_changed_keeps_the_whole_adapter(fleet: Fleet, own_loras: Path, name: str) -> None:
    path = own_loras / "rules" / name
    path.write_bytes(path.read_bytes() + b" ")
    before = files_of(own_loras / "rules")
    folder = folder_of(fleet, "rules")
    assert (folder.status, folder.reason) == ("left", f"{name} has changed since it was ingested")
    assert files_of(own_loras / "rules") == before


def test_a_file_that_changes_while_it_is_checked_stays(
    fleet: Fleet, own_loras: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = own_loras / "rules" / WEIGHTS
    real = placeholders._check_unchanged

    def write_first(files: Any) -> None:
        path.write_bytes(b"of another training")
        real(files)

    monkeypatch.setattr(placeholders, "_check_unchanged", write_first)
    assert folder_of(fleet, "rules").status == "left"
    assert path.read_bytes() == b"of another training"
    assert PLACEHOLDER_NAME not in names_in(own_loras / "rules")


def test_weights_that_change_while_other_files_go_are_not_deleted(
    fleet: Fleet, own_loras: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights, real = own_loras / "rules" / WEIGHTS, placeholders.unlink

    def write_then(path: Path) -> None:
        weights.write_bytes(b"of another training")
        real(path)

    monkeypatch.setattr(placeholders, "unlink", write_then)
    folder = folder_of(fleet, "rules")
    assert (folder.status, WEIGHTS in str(folder.reason)) == ("left", True)
    assert weights.read_bytes() == b"of another training"


def test_a_task_that_gets_a_new_version_while_its_code_is_checked_can_restore_its_folder(
    fleet: Fleet, own_loras: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = check._check_task

    def ingest_then(*about_the_task: Any) -> Any:
        made = real(*about_the_task)
        fleet.ingest([write_lora(tmp_path / "new" / "rules", seed=77)], name="rules", on_conflict="version")
        return made

    monkeypatch.setattr(check, "_check_task", ingest_then)
    before = files_of(own_loras / "rules")
    (task,) = fleet.evict(["rules"], max_error=0.7, placeholder=True).done
    assert (task.status, [folder.status for folder in task.folders]) == ("kept", ["replaced"])
    fleet.restore([own_loras / "rules"])
    assert files_of(own_loras / "rules") == before


def test_a_changed_folder_does_not_stop_the_others_or_the_eviction(fleet: Fleet, own_loras: Path) -> None:
    (own_loras / "rules" / CONFIG).write_text("{}")
    report = fleet.evict(max_error=0.7, placeholder=True)
    assert ([folder.status for folder in report.folders], report.is_partial) == (["replaced", "left", "replaced"], True)
    assert gone(fleet) == TASKS


def test_a_folder_that_is_gone_is_named_and_the_eviction_goes_on(fleet: Fleet, own_loras: Path) -> None:
    shutil.rmtree(own_loras / "rules")
    (own_loras / "silent" / WEIGHTS).unlink()
    report = fleet.evict(["rules", "silent"], max_error=0.7, placeholder=True)
    assert ([folder.status for folder in report.folders], report.is_partial) == (["missing", "missing"], False)
    assert gone(fleet) == ["rules", "silent"]


def test_a_link_is_never_followed_out(fleet: Fleet, own_loras: Path, tmp_path: Path) -> None:
    shutil.move(own_loras / "rules", tmp_path / "elsewhere")
    (own_loras / "rules").symlink_to(tmp_path / "elsewhere")
    shutil.move(own_loras / "silent" / WEIGHTS, tmp_path / "weights")
    (own_loras / "silent" / WEIGHTS).symlink_to(tmp_path / "weights")
    report = fleet.evict(["rules", "silent"], placeholder=True, keep_originals=True)
    assert [folder.status for folder in report.folders] == ["left", "left"]
    assert all("symbolic link" in str(folder.reason) for folder in report.folders)
    assert (names_in(tmp_path / "elsewhere") >= {CONFIG, WEIGHTS}, (tmp_path / "weights").exists()) == (True, True)


def test_a_folder_that_cannot_be_written_is_left(
    fleet: Fleet, own_loras: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def read_only(path: Path) -> Iterator[NoReturn]:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        yield

    monkeypatch.setattr(placeholders, "writing_file", read_only)
    folder = folder_of(fleet, "rules")
    assert (folder.status, folder.reason) == ("left", "it cannot be changed: Read-only file system")
    assert names_in(own_loras / "rules") >= {CONFIG, WEIGHTS}


def test_a_second_call_has_nothing_to_do(fleet: Fleet, own_loras: Path) -> None:
    fleet.evict(placeholder=True, keep_originals=True)
    before = files_of(own_loras)
    report = fleet.evict(placeholder=True, keep_originals=True)
    assert {task.status for task in report.done} == {"known"}
    assert {folder.status for folder in report.folders} == {"there"}
    assert (files_of(own_loras), report.is_partial) == (before, False)


def test_a_file_with_another_name_elsewhere_frees_nothing(fleet: Fleet, own_loras: Path, tmp_path: Path) -> None:
    (tmp_path / "link").hardlink_to(own_loras / "rules" / WEIGHTS)
    config = (own_loras / "rules" / CONFIG).stat().st_size
    assert folder_of(fleet, "rules").freed == config
    assert (tmp_path / "link").exists()


def test_the_placeholder_of_another_adapter_is_never_replaced(fleet: Fleet, own_loras: Path) -> None:
    folder_of(fleet, "silent")
    shutil.copy(own_loras / "silent" / PLACEHOLDER_NAME, own_loras / "rules" / PLACEHOLDER_NAME)
    folder = folder_of(fleet, "rules")
    assert (folder.status, "of task 'silent'" in str(folder.reason)) == ("left", True)
    assert names_in(own_loras / "rules") >= {CONFIG, WEIGHTS}


def test_one_folder_of_two_tasks_gives_way_once(fleet: Fleet, own_loras: Path) -> None:
    fleet.ingest([own_loras / "silent"], name="twin")
    report = fleet.evict(["silent", "twin"], placeholder=True, keep_originals=True)
    assert [(task.task, task.folders[0].status) for task in report.done] == [("silent", "replaced"), ("twin", "there")]


def test_tokenizers_that_the_store_has_give_way_and_changed_ones_stay(fleet: Fleet, tmp_path: Path) -> None:
    folder = write_lora(tmp_path / "odes", seed=8)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_text(json.dumps({"name": name}))
    fleet.ingest([folder])
    (folder / "tokenizer_config.json").write_text("{}")
    folder_of(fleet, "odes")
    assert names_in(folder) == {PLACEHOLDER_NAME, "tokenizer_config.json"}


@pytest.mark.slow
def test_a_pickle_gives_way_if_the_store_has_what_was_made_of_it(fleet: Fleet, tmp_path: Path) -> None:
    folder = write_lora(tmp_path / "odes", seed=8)
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()
    fleet.ingest([folder], read_bin=True)
    folder_of(fleet, "odes")
    assert names_in(folder) == {PLACEHOLDER_NAME}


def test_an_adapter_that_came_from_no_folder_has_none(fleet: Fleet, tmp_path: Path) -> None:
    fleet.export_bundle(tmp_path / "fleet.icm", ["rules"])
    other = Fleet(tmp_path / "other")
    other.import_bundle(tmp_path / "fleet.icm")
    (task,) = other.evict(max_error=0.7, placeholder=True).done
    assert task.folders == []


def test_a_checkpoint_that_a_placeholder_stands_for_keeps_its_original(fleet: Fleet, own_loras: Path) -> None:
    fleet.evict(["poems"], placeholder=True, keep_originals=True)
    report = fleet.evict(["poems"], max_error=0.7)
    (task,) = report.done
    assert (task.status, task.adapters, report.is_partial) == ("evicted", 1, True)
    assert "a placeholder replaces it" in str(task.reason)
    assert [row.is_evicted for row in fleet.show("poems").task.adapters] == [False, False, True]


def test_removing_a_task_tells_of_its_placeholders(fleet: Fleet, own_loras: Path) -> None:
    fleet.evict(["poems"], placeholder=True, keep_originals=True)
    planned = {task.name: task.placeholders for task in fleet.plan_removal(["poems", "rules"])}
    assert planned == {"poems": 3, "rules": 0}


@pytest.mark.parametrize(
    "options",
    [
        {"keep_originals": True},
        {"placeholder": True},
        {"placeholder": True, "keep_originals": True, "max_error": 0.7},
        {"placeholder": True, "checkpoints_only": True, "max_error": 0.7},
    ],
)
def test_options_that_contradict_each_other_delete_nothing(
    fleet: Fleet, own_loras: Path, options: dict[str, Any]
) -> None:
    before = files_of(own_loras)
    with pytest.raises(DataError):
        fleet.evict(**options)
    assert (files_of(own_loras), gone(fleet)) == (before, [])
