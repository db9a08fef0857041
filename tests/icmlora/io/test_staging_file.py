"""A file appears as a whole or not at all."""

from __future__ import annotations

import fcntl
import os
import stat
from pathlib import Path
from typing import BinaryIO

import pytest

from icmlora.errors import OutputExists
from icmlora.io.staging import writing_file


def write(path: Path, data: bytes, *, force: bool = False) -> None:
    with writing_file(path, force=force) as stream:
        stream.write(data)


def fail_half_way(stream: BinaryIO) -> None:
    stream.write(b"half")
    raise BufferError


def test_a_new_file_is_there_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    write(tmp_path / "deep" / "out", b"1")
    assert (tmp_path / "deep" / "out").read_bytes() == b"1"
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]


def test_an_error_while_writing_leaves_the_old_file(tmp_path: Path) -> None:
    write(tmp_path / "out", b"old")
    with pytest.raises(BufferError), writing_file(tmp_path / "out", force=True) as stream:
        fail_half_way(stream)
    assert (tmp_path / "out").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_file_that_somebody_else_made_meanwhile_is_left_alone(tmp_path: Path) -> None:
    with pytest.raises(OutputExists), writing_file(tmp_path / "out"):
        (tmp_path / "out").write_bytes(b"theirs")
    assert (tmp_path / "out").read_bytes() == b"theirs"


def test_a_folder_is_refused_even_by_force(tmp_path: Path) -> None:
    with pytest.raises(OutputExists, match="not a file"):
        write(tmp_path, b"1", force=True)


def test_force_through_a_link_replaces_what_it_leads_to(tmp_path: Path) -> None:
    (tmp_path / "real").write_bytes(b"old")
    (tmp_path / "link").symlink_to("real")
    write(tmp_path / "link", b"new", force=True)
    assert (tmp_path / "real").read_bytes() == b"new"
    assert (tmp_path / "link").is_symlink()


def test_what_a_killed_run_left_is_removed_by_the_next(tmp_path: Path) -> None:
    left = tmp_path / "out.icm-0123abcd"
    other = tmp_path / "other.icm-0123abcd"
    for path in (left, other):
        path.write_bytes(b"half")
    write(tmp_path / "out", b"1")
    assert sorted(path.name for path in tmp_path.iterdir()) == [other.name, "out"]


def test_one_that_another_run_took_for_left_before_it_was_locked_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, real, entries = tmp_path / "out", fcntl.flock, []

    def flock(descriptor: int, kind: int) -> None:
        if not entries:
            entries.extend(tmp_path.iterdir())
            write(target, b"other", force=True)
        real(descriptor, kind)

    monkeypatch.setattr(fcntl, "flock", flock)
    write(target, b"mine", force=True)
    assert len(entries) == 1
    assert target.read_bytes() == b"mine"
    assert list(tmp_path.iterdir()) == [target]


def test_what_a_running_process_writes_is_left_alone(tmp_path: Path) -> None:
    running = tmp_path / "out.icm-0123abcd"
    with running.open("xb") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        write(tmp_path / "out", b"1")
        assert running.exists()


def test_the_bytes_are_synced_before_the_name_and_the_name_before_it_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    replace = os.replace

    def fsync(descriptor: int) -> None:
        order.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "bytes")

    def rename(path: Path, target: Path) -> None:
        order.append("rename")
        replace(path, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", rename)
    write(tmp_path / "out", b"1")
    assert order == ["bytes", "rename", "folder"]
