"""The seam to the operating system."""

from __future__ import annotations

import errno
import fcntl
import mmap
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


PAGE = mmap.PAGESIZE
LARGE = fs._DIRECT_BYTES  # from here on whole pages go past the page cache


def paged(size: int) -> memoryview:
    """Return memory that begins on a page, with bytes that are nowhere else."""
    memory = memoryview(mmap.mmap(-1, max(1, size)))[:size]
    memory[:] = random.Random(size).randbytes(size)
    return memory


def writes_of(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, int]]:
    """Note each write: whether it goes past the page cache, and its length."""
    noted: list[tuple[bool, int]] = []
    real = fs.write

    def write(fd: int, data: fs.Bytes) -> None:
        noted.append((bool(fcntl.fcntl(fd, fcntl.F_GETFL) & fs._DIRECT), len(data)))
        real(fd, data)

    monkeypatch.setattr(fs, "write", write)
    return noted


SIZES = [0, 1, PAGE - 1, PAGE, PAGE + 1, LARGE - 1, LARGE, LARGE + 1, LARGE + PAGE - 1, LARGE + PAGE]


@pytest.mark.parametrize("size", SIZES)
def test_a_file_of_any_size_has_its_bytes_and_no_more(tmp_path: Path, size: int) -> None:
    data = paged(size)
    fs.write_file(tmp_path / "file", data, 0o644)
    assert (tmp_path / "file").read_bytes() == data


@pytest.mark.parametrize("begin", [0, 1, 16, 512])
def test_bytes_from_anywhere_in_memory_are_written(tmp_path: Path, begin: int) -> None:
    data = paged(2 * LARGE)[begin:]
    fs.write_file(tmp_path / "file", data, 0o644)
    assert (tmp_path / "file").read_bytes() == data


def test_whole_pages_go_past_the_cache_and_the_rest_through_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noted = writes_of(monkeypatch)
    fs.write_file(tmp_path / "file", paged(LARGE + 5), 0o644)
    if len(noted) == 1:
        pytest.skip("this file system has no writing past the cache")
    assert noted == [(True, LARGE), (False, 5)]


def test_small_files_go_through_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noted = writes_of(monkeypatch)
    fs.write_file(tmp_path / "file", paged(PAGE), 0o644)
    assert noted == [(False, PAGE)]


def test_a_system_that_cannot_write_past_the_cache_writes_through_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fs, "_DIRECT", 0)
    noted = writes_of(monkeypatch)
    data = paged(LARGE + 5)
    fs.write_file(tmp_path / "file", data, 0o644)
    assert (tmp_path / "file").read_bytes() == data
    assert noted == [(False, LARGE + 5)]


def test_a_file_system_that_cannot_write_past_the_cache_writes_through_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = fcntl.fcntl

    def refuse(fd: int, command: int, flags: int = 0) -> int:
        if command == fcntl.F_SETFL and flags & fs._DIRECT:
            raise OSError(errno.EINVAL, "invalid argument")
        return real(fd, command, flags)

    monkeypatch.setattr(fcntl, "fcntl", refuse)
    noted = writes_of(monkeypatch)
    data = paged(LARGE + 5)
    fs.write_file(tmp_path / "file", data, 0o644)
    assert (tmp_path / "file").read_bytes() == data
    assert noted == [(False, LARGE + 5)]


@pytest.mark.parametrize("taken", [0, PAGE, PAGE + 1, LARGE - 1])
def test_a_device_that_stops_taking_pages_gets_the_rest_through_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, taken: int
) -> None:
    real, is_first = os.write, [True]

    def refuse(fd: int, data: memoryview) -> int:
        if fcntl.fcntl(fd, fcntl.F_GETFL) & fs._DIRECT:
            if not is_first[0] or not taken:
                raise OSError(errno.EINVAL, "invalid argument")
            is_first[0] = False
            fcntl.fcntl(fd, fcntl.F_SETFL, os.O_WRONLY)  # since real direct writes take whole blocks alone
            count = real(fd, data[:taken])
            fcntl.fcntl(fd, fcntl.F_SETFL, os.O_WRONLY | fs._DIRECT)
            return count
        return real(fd, data)

    monkeypatch.setattr(os, "write", refuse)
    data = paged(LARGE + 5)
    fs.write_file(tmp_path / "file", data, 0o644)
    assert (tmp_path / "file").read_bytes() == data


def test_a_write_past_the_cache_that_fails_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(fd: int, data: memoryview) -> int:
        raise OSError(errno.ENOSPC, "no space left on device")

    monkeypatch.setattr(os, "write", fail)
    with pytest.raises(OSError, match="no space"):
        fs.write_file(tmp_path / "file", paged(LARGE), 0o644)
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
