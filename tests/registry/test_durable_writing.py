"""Durable writing, and the edges of careful reading."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from registry import files as fs
from registry.errors import RegistryError, SourceChanged, SourceRefused, StoreFull, StoreIOError, StoreReadOnly

OLD, NEW = b"the old bytes", b"new"


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """A file that is to be written over."""
    path = tmp_path / "config.json"
    path.write_bytes(OLD)
    return path


def failing(number: int) -> object:
    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


@given(data=st.binary(max_size=300))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_is_written_is_read_again(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "file").unlink(missing_ok=True)
    fs.write_file(tmp_path / "file", data)
    assert fs.read_plain(tmp_path / "file") == data
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("call", ["write", "fsync"])
def test_a_write_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    monkeypatch.setattr(os, call, failing(errno.ENOSPC))
    with pytest.raises(OSError, match="No space left"):
        fs.write_file(tmp_path / "file", NEW)
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_the_mode_of_a_new_file_follows_the_umask(tmp_path: Path, mask: int, mode: int) -> None:
    before = os.umask(mask)
    try:
        fs.write_file(tmp_path / "file", NEW)
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == mode


def test_a_new_file_is_never_created_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FileExistsError):
        fs.write_file(tmp_path / "link", NEW)
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("size", [0, 1, 7])
def test_the_limit_itself_is_allowed_and_one_byte_more_is_not(tmp_path: Path, size: int) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(size))
    assert fs.read_plain(path, max_bytes=size) == bytes(size)
    path.write_bytes(bytes(size + 1))
    with pytest.raises(SourceRefused, match=f"is {size + 1} bytes; the limit is {size}") as caught:
        fs.read_plain(path, max_bytes=size)
    assert caught.value.reason == "limits"


@given(data=st.binary(max_size=64), size=st.integers(0, 64), offset=st.integers(0, 64))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_part_of_a_file_is_read_exactly_or_not_at_all(tmp_path: Path, data: bytes, size: int, offset: int) -> None:
    (tmp_path / "file").write_bytes(data)
    with fs.open_plain(tmp_path / "file") as (fd, length):
        assert length == len(data)
        if size and offset + size > len(data):
            with pytest.raises(SourceChanged, match="was truncated"):
                fs.read_exactly(fd, size, offset)
        else:
            assert fs.read_exactly(fd, size, offset) == data[offset : offset + size]


def test_a_file_that_is_removed_while_it_is_read_is_refused(target: Path) -> None:
    with pytest.raises(SourceRefused, match="No such file") as caught, fs.open_plain(target):
        target.unlink()
    assert caught.value.reason == "unreadable"


def test_a_file_that_becomes_a_link_while_it_is_read_is_refused(target: Path) -> None:
    def swap() -> None:
        target.rename(target.with_name("moved"))
        target.symlink_to("moved")

    with pytest.raises(SourceChanged), fs.open_plain(target):
        swap()


def test_an_error_of_the_reader_is_not_hidden_by_a_change(target: Path) -> None:
    def change_and_fail() -> None:
        target.write_bytes(NEW)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), fs.open_plain(target):
        change_and_fail()


def test_no_descriptor_stays_open_after_a_refusal(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        with pytest.raises(SourceRefused):
            fs.read_plain(tmp_path)
        with pytest.raises(SourceRefused):
            fs.read_plain(tmp_path / "absent")
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_link_in_the_path_to_a_file_is_followed_and_one_in_its_place_is_not(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "file").write_bytes(NEW)
    (tmp_path / "folder").symlink_to("real")
    (tmp_path / "file").symlink_to("real/file")
    assert fs.read_plain(tmp_path / "folder" / "file") == NEW
    with pytest.raises(SourceRefused, match="is a symbolic link, which icm does not follow"):
        fs.read_plain(tmp_path / "file")


def test_an_error_that_is_not_the_systems_passes_through(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), fs.store_errors(tmp_path):
        raise ZeroDivisionError


@pytest.mark.parametrize(
    ("number", "kind", "hint"),
    [
        (errno.ENOSPC, StoreFull, "icm prune"),
        (errno.EPERM, StoreReadOnly, "permissions"),
        (errno.EIO, StoreIOError, ""),
    ],
)
def test_an_error_of_the_system_keeps_its_cause_its_path_and_says_what_to_do(
    tmp_path: Path, number: int, kind: type[RegistryError], hint: str
) -> None:
    with pytest.raises(kind) as caught, fs.store_errors(tmp_path):
        raise OSError(number, os.strerror(number))
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.path == str(tmp_path)
    assert hint in (caught.value.hint or "")


def test_a_temporary_file_that_cannot_be_removed_does_not_hide_the_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", failing(errno.EIO))
    monkeypatch.setattr(Path, "unlink", failing(errno.EROFS))
    with pytest.raises(OSError, match="Input/output"):
        fs.write_file(tmp_path / "file", NEW)
