"""Files from outside: only plain ones, and only unchanged ones."""

from __future__ import annotations

import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from registry import files as source
from registry.errors import SourceChanged, SourceRefused
from registry.files import read_plain


def test_a_plain_file_is_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"bytes")
    assert read_plain(path) == b"bytes"


def test_an_empty_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    assert read_plain(path) == b""


class TestRefusals:
    """Files that are refused."""

    def test_a_symbolic_link_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_bytes(b"secret")
        (tmp_path / "link").symlink_to("file")
        refuse(tmp_path / "link", "symlink")

    def test_a_pipe_is_refused_and_not_waited_for(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe")
        refuse(tmp_path / "pipe", "special-file")

    def test_a_device_is_refused(self, tmp_path: Path) -> None:
        refuse(Path(os.devnull), "special-file")

    def test_a_folder_is_refused(self, tmp_path: Path) -> None:
        refuse(tmp_path, "special-file")

    def test_an_absent_file_is_refused(self, tmp_path: Path) -> None:
        refuse(tmp_path / "absent", "unreadable")

    def test_a_file_above_the_limit_is_refused_before_it_is_read(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / "sparse"
        path.touch()
        os.truncate(path, source.MAX_SOURCE_BYTES + 1)
        monkeypatch.setattr(os, "preadv", lambda *_: pytest.fail("it was read"))
        refuse(path, "limits")


def refuse(path: Path, reason: str) -> None:
    with pytest.raises(SourceRefused) as caught:
        read_plain(path)
    assert caught.value.path == str(path)
    assert caught.value.reason == reason


def change_during_read(monkeypatch: pytest.MonkeyPatch, change: Callable[[], object]) -> None:
    real = os.preadv

    def preadv(fd: int, buffers: list[memoryview], offset: int) -> int:
        count = real(fd, buffers, offset)
        change()
        return count

    monkeypatch.setattr(os, "preadv", preadv)


def test_a_file_that_grows_while_it_is_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"bytes")
    change_during_read(monkeypatch, lambda: path.write_bytes(b"more bytes"))
    with pytest.raises(SourceChanged):
        read_plain(path)


def test_a_file_that_shrinks_while_it_is_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"bytes")
    real = os.fstat
    monkeypatch.setattr(os, "fstat", lambda fd: (real(fd), os.truncate(path, 2))[0])
    with pytest.raises(SourceChanged):
        read_plain(path)


def test_a_file_that_is_swapped_for_another_while_it_is_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, other = tmp_path / "file", tmp_path / "other"
    path.write_bytes(b"bytes")
    other.write_bytes(b"other")
    change_during_read(monkeypatch, lambda: other.exists() and other.replace(path))
    with pytest.raises(SourceChanged):
        read_plain(path)


def test_a_read_that_returns_less_than_asked_for_is_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"many bytes")
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: real(fd, [buffers[0][:3]], offset))
    assert read_plain(path) == b"many bytes"


def test_a_large_file_takes_its_own_size_of_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, size = tmp_path / "file", 8 << 20
    path.write_bytes(bytes(size))
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: real(fd, [buffers[0][: 1 << 20]], offset))
    tracemalloc.start()
    try:
        assert len(read_plain(path)) == size
        assert tracemalloc.get_traced_memory()[1] < size + (1 << 20)
    finally:
        tracemalloc.stop()
