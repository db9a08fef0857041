"""Files from outside: only plain ones, and only unchanged ones."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from registry import files as source
from registry.errors import SourceChanged, SourceRefused
from registry.files import read_source, source_size


def read(path: Path, size: int = 5) -> memoryview:
    return read_source(path, memoryview(bytearray(size)))


def test_a_plain_file_is_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"bytes")
    assert read(path, source_size(path)) == b"bytes"


def test_an_empty_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    assert read(path, source_size(path)) == b""


def test_what_was_read_cannot_be_changed(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"bytes")
    assert read(path).readonly


@pytest.mark.parametrize("data", [b"byte", b"bytes!", b""])
def test_a_file_of_another_length_than_it_was_found_to_have_is_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "file"
    path.write_bytes(data)
    with pytest.raises(SourceChanged):
        read(path, len(b"bytes"))


@pytest.mark.parametrize("read", [read, source_size])
class TestRefusals:
    """What both readers refuse."""

    def test_a_symbolic_link_is_refused(self, read: object, tmp_path: Path) -> None:
        (tmp_path / "file").write_bytes(b"secret")
        (tmp_path / "link").symlink_to("file")
        refuse(read, tmp_path / "link")

    def test_a_pipe_is_refused_and_not_waited_for(self, read: object, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe")
        refuse(read, tmp_path / "pipe")

    def test_a_device_is_refused(self, read: object, tmp_path: Path) -> None:
        refuse(read, Path(os.devnull))

    def test_a_folder_is_refused(self, read: object, tmp_path: Path) -> None:
        refuse(read, tmp_path)

    def test_an_absent_file_is_refused(self, read: object, tmp_path: Path) -> None:
        refuse(read, tmp_path / "absent")

    def test_a_file_above_the_limit_is_refused_before_it_is_read(
        self, read: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / "sparse"
        path.touch()
        os.truncate(path, source.MAX_SOURCE_BYTES + 1)
        monkeypatch.setattr(os, "readv", lambda *_: pytest.fail("it was read"))
        refuse(read, path)


def refuse(read: object, path: Path) -> None:
    assert callable(read)
    with pytest.raises(SourceRefused) as caught:
        read(path)
    assert caught.value.path == path


def change_during_read(monkeypatch: pytest.MonkeyPatch, change: object) -> None:
    real = os.readv

    def readv(fd: int, parts: list[memoryview]) -> int:
        count = real(fd, parts)
        assert callable(change)
        change()
        return count

    monkeypatch.setattr(os, "readv", readv)


def test_a_file_that_grows_while_it_is_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"bytes")
    change_during_read(monkeypatch, lambda: path.write_bytes(b"more bytes"))
    with pytest.raises(SourceChanged):
        read(path)


def test_a_file_that_shrinks_while_it_is_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"bytes")
    real = os.fstat
    monkeypatch.setattr(os, "fstat", lambda fd: (real(fd), os.truncate(path, 2))[0])
    with pytest.raises(SourceChanged):
        read(path)


def test_a_file_that_is_swapped_for_another_while_it_is_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, other = tmp_path / "file", tmp_path / "other"
    path.write_bytes(b"bytes")
    other.write_bytes(b"other")
    change_during_read(monkeypatch, lambda: other.exists() and other.replace(path))
    with pytest.raises(SourceChanged):
        read(path)


def test_a_read_that_returns_less_than_asked_for_is_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"many bytes")
    real = os.readv
    monkeypatch.setattr(os, "readv", lambda fd, parts: real(fd, [parts[0][:3]]))
    assert read(path, 10) == b"many bytes"
