"""Careful reading and durable writing."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from icmlora.errors import AdapterRefused, UnsafeInput
from icmlora.io.files import hash_regular, open_regular, read_exactly, read_regular


def test_a_regular_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert read_regular(tmp_path / "a", max_bytes=3) == b"abc"


def test_a_file_over_the_limit_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abcd")
    with pytest.raises(UnsafeInput) as caught:
        read_regular(tmp_path / "a", max_bytes=3)
    assert caught.value.kind == "limits"


def test_a_symbolic_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    (tmp_path / "link").symlink_to("a")
    with pytest.raises(UnsafeInput) as caught:
        read_regular(tmp_path / "link", max_bytes=3)
    assert caught.value.kind == "symlink"


def test_a_fifo_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(UnsafeInput) as caught:
        read_regular(tmp_path / "fifo", max_bytes=3)
    assert caught.value.kind == "special-file"


def test_a_device_is_refused() -> None:
    with pytest.raises(UnsafeInput, match="not a regular file"):
        read_regular(Path("/dev/zero"), max_bytes=3)


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsafeInput, match="not a regular file"):
        read_regular(tmp_path, max_bytes=3)


def test_a_missing_file_is_refused_with_its_path(tmp_path: Path) -> None:
    with pytest.raises(AdapterRefused, match="No such file") as caught:
        read_regular(tmp_path / "none", max_bytes=3)
    assert caught.value.path == str(tmp_path / "none")


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"abc")
    with pytest.raises(UnsafeInput, match="changed"), open_regular(path, max_bytes=10):
        path.write_bytes(b"abcdef")


def test_a_file_that_is_cut_while_it_is_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"abc")
    descriptor = os.open(path, os.O_RDONLY)
    os.truncate(path, 1)
    with pytest.raises(UnsafeInput, match="truncated"):
        read_exactly(descriptor, 3, 0)
    os.close(descriptor)


def test_a_file_is_hashed_whatever_its_size(tmp_path: Path) -> None:
    for data in (b"", b"abc", os.urandom((1 << 20) + 1)):
        (tmp_path / "a").write_bytes(data)
        assert hash_regular(tmp_path / "a").digest == hashlib.sha256(data).hexdigest()


def test_a_hashed_file_knows_whether_it_was_written_replaced_or_removed(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"abc")
    hashed = hash_regular(path)
    assert hashed.is_unchanged()
    os.utime(path, ns=(0, 0))
    assert not hashed.is_unchanged()
    hashed = hash_regular(path)
    (tmp_path / "b").write_bytes(b"abc")
    os.utime(tmp_path / "b", ns=(0, 0))
    (tmp_path / "b").replace(path)
    assert not hashed.is_unchanged()
    path.unlink()
    assert not hashed.is_unchanged()
