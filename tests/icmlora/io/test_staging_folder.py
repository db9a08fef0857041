"""A folder appears as a whole or not at all."""

from __future__ import annotations

import fcntl
import os
import stat
from pathlib import Path

import pytest

from icmlora.errors import OutputExists
from icmlora.io import staging as output_folder
from icmlora.io.staging import check_free, remove_abandoned, write_folder

FILES = {"a": b"1", "b": b"2"}


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_new_folder_holds_the_files_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    write_folder(tmp_path / "deep" / "out", FILES)
    assert content(tmp_path / "deep" / "out") == FILES
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    write_folder(tmp_path / "out", FILES)
    assert content(tmp_path / "out") == FILES


def test_a_link_to_an_empty_folder_is_filled_where_it_leads(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "out").symlink_to("real")
    write_folder(tmp_path / "out", FILES)
    assert content(tmp_path / "real") == FILES


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_bytes(b"x")
    with pytest.raises(OutputExists, match="not empty") as caught:
        write_folder(tmp_path / "out", FILES)
    assert "--force" in (caught.value.hint or "")
    assert content(tmp_path / "out") == {"mine": b"x"}


def test_force_replaces_the_files_and_keeps_the_others(tmp_path: Path) -> None:
    write_folder(tmp_path / "out", FILES)
    (tmp_path / "out" / "mine").write_bytes(b"x")
    write_folder(tmp_path / "out", {"a": b"new"}, force=True)
    assert content(tmp_path / "out") == {"a": b"new", "b": b"2", "mine": b"x"}


def test_a_file_in_the_way_is_an_error_even_with_force(tmp_path: Path) -> None:
    (tmp_path / "out").write_bytes(b"x")
    with pytest.raises(OutputExists, match="not a folder"):
        write_folder(tmp_path / "out", FILES, force=True)


def test_a_filled_folder_is_found_before_the_work(tmp_path: Path) -> None:
    write_folder(tmp_path / "out", FILES)
    with pytest.raises(OutputExists, match="not empty"):
        check_free(tmp_path / "out")
    check_free(tmp_path / "out", force=True)


def test_a_missing_or_empty_folder_is_free(tmp_path: Path) -> None:
    check_free(tmp_path / "none")
    check_free(tmp_path)


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, _data: bytes) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(output_folder.fs, "write_file", full)
    with pytest.raises(OSError, match="No space"):
        write_folder(tmp_path / "out", FILES)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_filled_meanwhile_is_not_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def intrude(_folder: Path) -> None:
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / "mine").write_bytes(b"x")

    monkeypatch.setattr(output_folder.fs, "fsync_dir", intrude)
    with pytest.raises(OutputExists, match="meanwhile"):
        write_folder(tmp_path / "out", FILES)
    assert content(tmp_path / "out") == {"mine": b"x"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_where_nothing_can_be_made_is_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)  # who runs the tests may be root
    with pytest.raises(PermissionError) as caught:
        check_free(tmp_path / "new" / "out")
    assert caught.value.filename == str(tmp_path)


def test_what_a_killed_run_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / "out.icm-0123abcd").mkdir()
    (tmp_path / "out.icm-0123abcd" / "a").write_bytes(b"half")
    write_folder(tmp_path / "out", FILES)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_another_run_is_building_is_not_removed(tmp_path: Path) -> None:
    building = tmp_path / "out.icm-0123abcd"
    building.mkdir()
    descriptor = os.open(building, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    write_folder(tmp_path / "out", FILES)
    os.close(descriptor)
    assert building.is_dir()


def test_one_that_another_run_took_for_left_before_it_was_locked_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, removed = fcntl.flock, []

    def flock(descriptor: int, kind: int) -> None:
        if not removed:
            removed.extend(tmp_path.iterdir())
            remove_abandoned(tmp_path / "out", flags=os.O_DIRECTORY, remove=Path.rmdir)
        real(descriptor, kind)

    monkeypatch.setattr(fcntl, "flock", flock)
    write_folder(tmp_path / "out", FILES)
    assert len(removed) == 1
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]
    assert content(tmp_path / "out") == FILES


@pytest.mark.parametrize("name", ["out.icm-backup", "other.icm-0123abcd", "out.icm-0123abcd.d"])
def test_folders_of_other_names_are_not_removed(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    write_folder(tmp_path / "out", FILES)
    assert (tmp_path / name).is_dir()


def test_a_link_with_the_name_of_a_leftover_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a").write_bytes(b"x")
    (tmp_path / "out.icm-0123abcd").symlink_to("mine")
    write_folder(tmp_path / "out", FILES)
    assert content(tmp_path / "mine") == {"a": b"x"}


@pytest.mark.parametrize(("umask", "folder", "file"), [(0o022, 0o755, 0o644), (0o077, 0o700, 0o600)])
def test_modes_follow_the_umask(tmp_path: Path, umask: int, folder: int, file: int) -> None:
    before = os.umask(umask)
    try:
        write_folder(tmp_path / "out", FILES)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == folder
    assert stat.S_IMODE((tmp_path / "out" / "a").stat().st_mode) == file
