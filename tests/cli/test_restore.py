"""`icm evict --placeholder`, `icm ingest` of what that leaves, and `icm restore`: what is said, and the exit codes."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from icm_cli.errors import ExitCode
from icmlora.formats.discovery.placeholder import PLACEHOLDER_NAME
from icmlora.io import staging
from registry.store import Store
from tests.cli.conftest import Ran, modules_of

Icm = Callable[..., Ran]
KEEP = ("evict", "--placeholder", "--keep-originals")
LOSE = ("evict", "--placeholder", "--max-error", "0.7")


@pytest.fixture
def here(own_loras: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folders of the fleet, seen from the folder above them."""
    monkeypatch.chdir(own_loras.parent)
    return own_loras


def test_freeing_the_folders_says_what_that_frees_and_how_to_undo_it(icm: Icm, here: Path) -> None:
    ran = icm(*KEEP)
    lines = ran.out.splitlines()
    assert (ran.code, lines[0].split()) == (0, ["TASK", "RESULT", "FREED", "IN", "FOLDER"])
    assert lines[1].split()[:2] == ["poems", "placeholder"]
    assert f"wrote a placeholder to {here / 'poems'}" in lines
    assert lines[-1].startswith("wrote 5 placeholders, freed ")
    assert "run `icm restore FOLDER` to restore adapters byte for byte" in ran.err


def test_an_eviction_with_placeholders_counts_store_and_folders_apart(icm: Icm, here: Path) -> None:
    ran = icm(*LOSE)
    assert ran.code == 0
    assert ran.out.splitlines()[0].split()[-3:] == ["FREED", "IN", "FOLDER"]
    assert [line.partition(",")[0] for line in ran.out.splitlines()[-2:]] == [
        "evicted 3 of 3 tasks",
        "wrote 3 placeholders",
    ]
    assert "kept checkpoints in their folders" in ran.err


@pytest.mark.slow
def test_a_changed_file_is_named_and_sets_exit_code_3(icm: Icm, here: Path) -> None:
    (here / "rules" / "adapter_config.json").write_text("{}")
    ran = icm(*LOSE)
    assert ran.code == ExitCode.PARTLY
    assert f"kept {here / 'rules'}: adapter_config.json has changed since it was ingested" in ran.out


def test_a_folder_that_is_gone_is_mentioned_and_no_failure(icm: Icm, here: Path) -> None:
    shutil.rmtree(here / "rules")
    ran = icm(*LOSE)
    assert (ran.code, "skipped 1 adapter no longer in its source folder" in ran.err) == (0, True)


def test_quiet_prints_the_tasks_whose_folders_were_freed(icm: Icm, here: Path) -> None:
    assert icm(*KEEP, "rules", "silent", "-q").out.split() == ["rules", "silent"]
    assert icm(*KEEP, "-q").out.split() == ["poems"]


@pytest.mark.parametrize(
    "options",
    [
        ("--keep-originals",),
        ("--placeholder",),
        ("--placeholder", "--keep-originals", "--max-error", "0.7"),
        ("--placeholder", "--max-error", "0.7", "--checkpoints-only"),
    ],
)
def test_options_that_contradict_each_other_are_wrong_usage(icm: Icm, options: tuple[str, ...]) -> None:
    assert icm("evict", *options).code == ExitCode.USAGE


def test_ingest_passes_over_placeholders_and_says_so(icm: Icm, here: Path) -> None:
    icm(*LOSE, "poems")
    ran = icm("ingest", here, "--no-vectors")
    assert (ran.code, "ingested 2 tasks: 0 new adapters, 2 unchanged" in ran.out) == (0, True)
    assert "skipped 1 placeholder of poems" in ran.err
    assert "skipped 2 checkpoints next to them" in ran.err
    assert "`icm restore" in ran.err
    assert [row["name"] for row in icm("ls", "--json").document] == ["poems", "rules", "silent"]


def test_ingest_of_nothing_but_placeholders_is_no_failure_and_makes_no_store(
    icm: Icm, here: Path, tmp_path: Path
) -> None:
    icm(*KEEP)
    ran = icm("--store", tmp_path / "new", "ingest", here)
    assert (ran.code, "5 placeholders" in ran.err, (tmp_path / "new").exists()) == (0, True, False)


def test_a_damaged_placeholder_is_listed_with_what_was_not_taken(icm: Icm, here: Path) -> None:
    icm(*KEEP, "rules")
    (here / "rules" / PLACEHOLDER_NAME).write_text("[]")
    ran = icm("ingest", here, "--no-vectors", "--json")
    (problem,) = (event for event in ran.events if event["type"] == "problem")
    assert (ran.code, Path(problem["path"]).name) == (ExitCode.PARTLY, PLACEHOLDER_NAME)
    assert len([event for event in ran.events if event["type"] == "task"]) == 2


def test_restore_says_of_each_where_it_came_from_and_what_was_lost(icm: Icm, here: Path) -> None:
    icm(*KEEP, "rules")
    icm(*LOSE, "silent")
    error = icm("show", "silent", "--json").document["code"]["relative_error"]
    ran = icm("restore", "loras")
    lines = [line.split() for line in ran.out.splitlines()]
    assert ran.code == 0
    assert lines[0] == ["FOLDER", "TASK", "FROM", "SIZE", "RELATIVE", "ERROR", "RETAINED", "GAIN"]
    assert (lines[1][:3], lines[1][-2:]) == (["loras/rules", "rules", "original"], ["-", "-"])
    assert (lines[2][:3], lines[2][-2:]) == (["loras/silent", "silent", "code"], [f"{error:.4f}", "-"])
    assert " ".join(lines[3]).startswith("restored 2 of 2 adapters: 1 byte for byte, 1 from codes; ")


def test_a_dry_run_of_restore_writes_nothing(icm: Icm, here: Path) -> None:
    icm(*KEEP, "rules")
    ran = icm("restore", here, "--dry-run")
    assert (ran.code, "would restore 1 of 1 adapter" in ran.out) == (0, True)
    assert [path.name for path in (here / "rules").iterdir() if path.suffix == ".safetensors"] == []


def test_restore_without_placeholders_says_so(icm: Icm, here: Path) -> None:
    ran = icm("restore", here)
    assert (ran.code, ran.out) == (0, "found no placeholders\n")


def test_restore_quietly_prints_the_folders(icm: Icm, here: Path) -> None:
    icm(*KEEP, "rules")
    assert icm("restore", here, "-q").out == f"{here / 'rules'}\n"


def test_what_cannot_be_restored_is_listed_with_exit_code_3(icm: Icm, here: Path) -> None:
    icm(*KEEP, "rules", "silent")
    (here / "rules" / "adapter_config.json").write_text("{}")
    ran = icm("restore", here)
    assert ran.code == ExitCode.PARTLY
    assert "skipped loras/rules: adapter_config.json already exists" in ran.out
    assert "hint: move it elsewhere" in ran.err
    assert "restored 1 of 2 adapters" in ran.out


def test_if_nothing_can_be_restored_every_reason_is_listed(icm: Icm, here: Path) -> None:
    icm(*KEEP, "rules", "silent")
    for name in ("rules", "silent"):
        (here / name / "adapter_config.json").write_text("{}")
    ran = icm("restore", here)
    assert (ran.code, ran.out.count("skipped loras/")) == (ExitCode.FAILED, 2)
    assert "all 2 placeholders were refused" in ran.err


def test_a_damaged_original_has_the_exit_code_of_damage(icm: Icm, here: Path, trained: Path) -> None:
    icm(*KEEP, "rules")
    with Store.open(trained) as store:
        blob = Path(store.blobs.place(store.task("rules").final.weights))
    blob.chmod(0o644)
    blob.write_bytes(b"damaged")
    assert icm("restore", here, "--json").code == ExitCode.DAMAGED


def test_without_a_store_the_exit_code_says_so_and_the_hint_names_the_one_to_use(
    icm: Icm, here: Path, trained: Path, tmp_path: Path
) -> None:
    icm(*KEEP, "rules")
    ran = icm("--store", tmp_path / "none", "restore", here, "--json")
    assert (ran.code, str(trained) in ran.error["hint"]) == (ExitCode.NO_STORE, True)


@pytest.mark.slow
def test_a_bundle_brings_them_back_without_a_store(icm: Icm, here: Path, tmp_path: Path) -> None:
    icm("export", "fleet.icm")
    icm(*LOSE)
    ran = icm("--store", tmp_path / "none", "restore", here, "--from", "fleet.icm")
    assert (ran.code, "3 from codes" in ran.out) == (0, True)


def test_what_came_from_codes_is_ingested_again_without_a_word_of_conflict(icm: Icm, here: Path) -> None:
    icm(*LOSE)
    icm("restore", here)
    ran = icm("ingest", here, "--no-vectors")
    assert (ran.code, "0 new adapters" in ran.out) == (0, True)
    assert "3 tasks skipped, because icm wrote their adapters from the code of an evicted task" in ran.err


@pytest.mark.slow
def test_originals_are_restored_without_torch(icm: Icm, here: Path) -> None:
    icm(*KEEP, "rules")
    assert "torch" not in modules_of("restore", str(here))
    assert (here / "rules" / "adapter_model.safetensors").exists()


def test_rm_warns_of_placeholders(icm: Icm, here: Path) -> None:
    icm(*KEEP, "poems")
    ran = icm("rm", "poems", "--dry-run")
    assert "3 placeholders could not be restored" in ran.err
    assert icm("rm", "poems", "rules", "--dry-run", "--json").document["placeholders"] == ["poems"]


def test_placeholders_that_a_full_disk_has_no_room_for_have_its_exit_code_and_their_folders_stay(
    icm: Icm, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fsync(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(staging.fs, "fsync", fsync)
        ran = icm(*KEEP)
    assert (ran.code, "free some space" in ran.err) == (ExitCode.NO_SPACE, True)
    assert f"kept {here / 'rules'}: it cannot be changed: No space left on device" in ran.out
    assert not list(here.rglob(f"*{PLACEHOLDER_NAME}*"))
    assert icm(*KEEP).code == 0


@pytest.mark.parametrize("room", [0, 1])
def test_a_full_disk_has_its_own_exit_code_and_leaves_only_placeholders(
    icm: Icm, here: Path, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    icm(*KEEP)
    real, left = staging.fs.fsync, [room * 5]  # syncs of the first adapter, which has two files

    def fsync(descriptor: int) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(staging.fs, "fsync", fsync)
        ran = icm("restore", here)
    assert (ran.code, "No space left" in ran.out + ran.err) == (ExitCode.NO_SPACE, True)
    for folder in (here / "poems", here / "rules", here / "silent"):
        names = {path.name for path in folder.iterdir()}
        assert not any(".icm-" in name for name in names)
        assert (PLACEHOLDER_NAME in names) != ("adapter_config.json" in names)
    assert icm("restore", here).code == 0
