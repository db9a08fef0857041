"""The seam to the operating system."""

from __future__ import annotations

import errno
import os
import random
from pathlib import Path

import pytest

from registry import files as fs
from registry.errors import StoreFull, StoreIOError, StoreReadOnly


@pytest.mark.parametrize("data", [b"bytes", bytearray(b"bytes"), memoryview(b"bytes"), b""])
def test_a_written_file_has_the_bytes_that_were_given(tmp_path: Path, data: fs.Bytes) -> None:
    fs.write_file(tmp_path / "file", data, 0o444)
    assert (tmp_path / "file").read_bytes() == data


def test_a_file_that_exists_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"precious")
    with pytest.raises(FileExistsError):
        fs.write_file(tmp_path / "file", b"new", 0o644)
    assert (tmp_path / "file").read_bytes() == b"precious"


def test_what_the_kernel_did_not_take_is_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, bytes(data)[:3]))
    fs.write_file(tmp_path / "file", b"ten bytes!", 0o644)
    assert (tmp_path / "file").read_bytes() == b"ten bytes!"


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 4097, 1 << 20])
def test_a_file_of_any_size_has_its_bytes_and_no_more(tmp_path: Path, size: int) -> None:
    data = random.Random(size).randbytes(size)
    fs.write_file(tmp_path / "file", data, 0o644)
    assert (tmp_path / "file").read_bytes() == data


def test_a_write_that_fails_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(fd: int, data: memoryview) -> int:
        raise OSError(errno.ENOSPC, "no space left on device")

    monkeypatch.setattr(os, "write", fail)
    with pytest.raises(OSError, match="no space"):
        fs.write_file(tmp_path / "file", b"bytes", 0o644)
    assert list(tmp_path.iterdir()) == []


def test_a_file_whose_sync_fails_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(fd: int) -> None:
        raise OSError(errno.EIO, "input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="input/output"):
        fs.write_file(tmp_path / "file", b"bytes", 0o644)
    assert not (tmp_path / "file").exists()


def test_removing_a_file_that_is_gone_is_fine(tmp_path: Path) -> None:
    fs.unlink(tmp_path / "gone")


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (errno.ENOSPC, StoreFull),
        (errno.EDQUOT, StoreFull),
        (errno.EROFS, StoreReadOnly),
        (errno.EACCES, StoreReadOnly),
        (errno.EIO, StoreIOError),
        (errno.EMFILE, StoreIOError),
    ],
)
def test_each_failure_of_the_system_has_its_own_error(number: int, expected: type[Exception], tmp_path: Path) -> None:
    with pytest.raises(expected) as caught, fs.store_errors(tmp_path):
        raise OSError(number, os.strerror(number))
    assert str(tmp_path) in str(caught.value)


def test_a_failpoint_does_nothing_unless_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ICM_FAILPOINT", "another")
    monkeypatch.setattr(os, "kill", lambda *_: pytest.fail("it killed"))
    fs.failpoint("this")
