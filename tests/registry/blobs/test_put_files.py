"""Storing many files at once."""

from __future__ import annotations

import errno
import hashlib
import itertools
import os
import random
from pathlib import Path

import pytest

from registry import files as fs
from registry.errors import SourceRefused, StoreFull, StoreIOError
from registry.storage.blobs.content import PutRefusal, PutResult, digest_of
from registry.store import Store
from tests.shared import paths_of

pytestmark = pytest.mark.kept_in("sqlite", "folder", reason="the temporary files of a store folder")


def write(folder: Path, **contents: bytes) -> list[Path]:
    folder.mkdir(exist_ok=True)
    for name, data in contents.items():
        (folder / name).write_bytes(data)
    return [folder / name for name in contents]


def length(path: Path, data: bytes) -> int:
    return len(data)


def leftovers(store: Store) -> list[Path]:
    return list(paths_of(store).tmp.iterdir())


def test_files_are_stored_in_order_with_what_the_inspection_said(store: Store, tmp_path: Path) -> None:
    files = write(tmp_path / "in", a=b"one", b=b"three")
    results = store.blobs.put_files(files, length)
    assert results == [
        PutResult(files[0], hashlib.sha256(b"one").hexdigest(), 3, True, 3),
        PutResult(files[1], hashlib.sha256(b"three").hexdigest(), 5, True, 5),
    ]
    assert store.blobs.read(hashlib.sha256(b"three").hexdigest()) == b"three"


def test_no_files_are_no_work(store: Store) -> None:
    assert store.blobs.put_files([], length) == []


def test_a_file_that_the_store_has_is_not_new(store: Store, tmp_path: Path) -> None:
    files = write(tmp_path / "in", a=b"one")
    store.blobs.put_files(files, length)
    (result,) = store.blobs.put_files(files, length)
    assert isinstance(result, PutResult)
    assert not result.is_new


def test_of_equal_files_one_is_written(store: Store, tmp_path: Path) -> None:
    files = write(tmp_path / "in", **{f"f{n}": b"equal" for n in range(20)})
    results = store.blobs.put_files(files, length)
    assert sum(isinstance(result, PutResult) and result.is_new for result in results) == 1
    assert len({result.digest for result in results if isinstance(result, PutResult)}) == 1
    assert leftovers(store) == []


def test_a_refused_file_leaves_nothing_and_the_others_go_on(store: Store, tmp_path: Path) -> None:
    files = write(tmp_path / "in", good=b"good", bad=b"bad")

    def inspect(path: Path, data: bytes) -> None:
        if data == b"bad":
            raise LookupError(path.name)

    good, bad = store.blobs.put_files(files, inspect, refusals=(LookupError,))
    assert isinstance(good, PutResult)
    assert isinstance(bad, PutRefusal)
    assert isinstance(bad.error, LookupError)
    assert [finding.digest for finding in store.verify()] == [good.digest]


def test_a_link_among_the_files_is_refused(store: Store, tmp_path: Path) -> None:
    files = write(tmp_path / "in", good=b"good")
    (tmp_path / "in" / "link").symlink_to("good")
    _, link = store.blobs.put_files([*files, tmp_path / "in" / "link"], length)
    assert isinstance(link, PutRefusal)
    assert isinstance(link.error, SourceRefused)


def test_an_unexpected_error_of_the_inspection_ends_the_batch_with_nothing_stored(store: Store, tmp_path: Path) -> None:
    files = write(tmp_path / "in", **{f"f{n}": bytes([n]) for n in range(30)})

    def inspect(path: Path, data: bytes) -> None:
        if path.name == "f20":
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        store.blobs.put_files(files, inspect)
    assert leftovers(store) == []
    assert list(store.verify()) == []


def test_a_disk_that_fills_up_leaves_nothing_of_the_batch(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = write(tmp_path / "in", **{f"f{n}": bytes([n]) * 1000 for n in range(30)})
    real = fs.write

    def fail_on_one(fd: int, data: fs.Bytes) -> None:
        if bytes(data[:1]) == b"\x0f":
            raise OSError(errno.ENOSPC, "no space left on device")
        real(fd, data)

    monkeypatch.setattr(fs, "write", fail_on_one)
    with pytest.raises(StoreFull):
        store.blobs.put_files(files, length)
    assert leftovers(store) == []
    assert list(store.verify()) == []


def test_a_clean_up_that_fails_too_does_not_hide_the_full_disk(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = write(tmp_path / "in", good=b"good", bad=b"bad")
    real = fs.write

    def fail_on_bad(fd: int, data: fs.Bytes) -> None:
        if bytes(data) == b"bad":
            raise OSError(errno.ENOSPC, "no space left on device")
        real(fd, data)

    def fail(path: Path) -> None:
        raise OSError(errno.EIO, "input/output error")

    monkeypatch.setattr(fs, "write", fail_on_bad)
    monkeypatch.setattr(fs, "unlink", fail)
    with pytest.raises(StoreFull):
        store.blobs.put_files(files, length)


SIZES = [0, 1, 4095, 4096, 4097, 3_000_001]


def test_a_file_of_any_size_is_stored_as_it_was_inspected(store: Store, tmp_path: Path) -> None:
    draw = random.Random(20)
    files = write(tmp_path / "in", **{f"f{size}": draw.randbytes(size) for size in SIZES})
    results = store.blobs.put_files(files, lambda path, data: digest_of(data))
    for path, result in zip(files, results, strict=True):
        assert isinstance(result, PutResult)
        assert result.inspected == result.digest == digest_of(path.read_bytes())
        assert Path(store.blobs.place(result.digest)).read_bytes() == path.read_bytes()
    assert leftovers(store) == []


def test_a_file_whose_damaged_blob_is_there_heals_it(store: Store, tmp_path: Path) -> None:
    files = write(tmp_path / "in", a=bytes(3_000_001))
    (first,) = store.blobs.put_files(files, length)
    assert isinstance(first, PutResult)
    blob = Path(store.blobs.place(first.digest))
    blob.chmod(0o644)
    os.truncate(blob, 4096)
    (again,) = store.blobs.put_files(files, length)
    assert isinstance(again, PutResult)
    assert again.is_new
    assert store.blobs.read(first.digest) == bytes(3_000_001)


def test_bytes_in_memory_are_stored_with_the_files_and_have_no_result_of_their_own(
    store: Store, tmp_path: Path
) -> None:
    files = write(tmp_path / "in", a=b"one")
    results = store.blobs.put_files(files, length, contents=[b"config", b"config", b"one"])
    assert [result.path for result in results] == files
    assert [store.blobs.read(digest_of(data)) for data in (b"one", b"config")] == [b"one", b"config"]
    assert leftovers(store) == []


def test_a_sync_that_fails_leaves_nothing_of_the_batch(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = write(tmp_path / "in", **{f"f{n}": bytes([n]) for n in range(30)})
    real, calls = fs.fsync, itertools.count()

    def fail_late(fd: int) -> None:
        if next(calls) == 25:
            raise OSError(errno.EIO, "input/output error")
        real(fd)

    monkeypatch.setattr(fs, "fsync", fail_late)
    with pytest.raises(StoreIOError):
        store.blobs.put_files(files, length)
    assert leftovers(store) == []
    assert list(store.verify()) == []
