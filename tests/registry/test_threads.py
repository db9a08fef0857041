"""The same thing done to many files at once."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from registry import files as fs
from registry.blobs.local import Syncer, each, each_synced
from registry.errors import StoreIOError


def open_file(path: Path) -> int:
    return fs.write_unsynced(path, b"data", 0o600)


def test_results_keep_the_order_of_the_items() -> None:
    assert each(lambda item: item * 2, range(50), undo=lambda _: None) == list(range(0, 100, 2))


def test_what_was_done_is_undone_when_one_call_fails() -> None:
    done: set[int] = set()

    def call(item: int) -> int:
        if item == 3:
            raise LookupError
        done.add(item)
        return item

    with pytest.raises(LookupError):
        each(call, range(10), undo=done.remove)
    assert done == set()


def test_more_files_than_may_be_open_are_all_synced_and_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr(fs, "fsync", lambda fd: synced.append(os.fstat(fd).st_ino))

    def call(number: int, syncer: Syncer) -> int:
        path = tmp_path / str(number)
        syncer.sync(open_file(path), path)
        return path.stat().st_ino

    files = each_synced(call, range(200), undo=lambda _: None)
    assert sorted(synced) == sorted(files)
    assert not [fd for fd in Path("/proc/self/fd").iterdir() if str(tmp_path) in str(fd.resolve())]


def test_a_file_that_cannot_be_synced_undoes_all_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(fd: int) -> None:
        raise OSError(5, "input/output error")

    def call(path: Path, syncer: Syncer) -> Path:
        syncer.sync(open_file(path), path)
        return path

    monkeypatch.setattr(fs, "fsync", fail)
    with pytest.raises(StoreIOError):
        each_synced(call, [tmp_path / "a", tmp_path / "b"], undo=fs.unlink)
    assert list(tmp_path.iterdir()) == []
