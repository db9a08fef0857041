"""Content-addressed files: put, read, compare, heal, remove."""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from registry import files as fs
from registry.blobs.local import BlobStore
from registry.errors import DamagedBlob, MissingBlob
from registry.folder import StorePaths


def make_blobs(root: Path) -> BlobStore:
    paths = StorePaths(root)
    for folder in (paths.blobs, paths.tmp, paths.quarantine):
        folder.mkdir(parents=True, exist_ok=True)
    return BlobStore(paths)


@pytest.fixture
def blobs(tmp_path: Path) -> BlobStore:
    return make_blobs(tmp_path)


def path_of(root: Path, digest: str) -> Path:
    return StorePaths(root).blob(digest)


def damage(path: Path, data: bytes) -> None:
    path.chmod(0o644)
    path.write_bytes(data)


def test_a_blob_is_named_by_the_sha256_of_its_bytes(blobs: BlobStore) -> None:
    assert blobs.put([b"bytes"]) == [hashlib.sha256(b"bytes").hexdigest()]


@settings(max_examples=30)
@given(items=st.lists(st.binary(max_size=200), max_size=8))
def test_what_is_put_is_read_back_in_order(tmp_path_factory: pytest.TempPathFactory, items: list[bytes]) -> None:
    blobs = make_blobs(tmp_path_factory.mktemp("blobs"))
    assert [blobs.read(digest) for digest in blobs.put(items)] == items
    assert set(blobs.digests()) == {hashlib.sha256(item).hexdigest() for item in items}


def test_nothing_is_left_in_tmp(blobs: BlobStore, tmp_path: Path) -> None:
    blobs.put([b"one", b"two", b"one"])
    assert list((tmp_path / "tmp").iterdir()) == []


def test_equal_bytes_are_written_once(blobs: BlobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    blobs.put([b"bytes"])
    monkeypatch.setattr(fs, "write_file", lambda *_: pytest.fail("it was written again"))
    blobs.put([b"bytes"])


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_a_blob_is_read_only_within_the_umask(blobs: BlobStore, tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        (digest,) = blobs.put([b"bytes"])
    finally:
        os.umask(before)
    assert stat.S_IMODE(path_of(tmp_path, digest).stat().st_mode) == 0o444 & ~mask


def test_each_name_follows_a_sync_of_its_bytes_and_precedes_one_of_its_folder(
    blobs: BlobStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    for name in ("fsync", "replace", "fsync_dir"):
        real = getattr(fs, name)
        monkeypatch.setattr(fs, name, lambda *a, real=real, name=name: (calls.append(name), real(*a))[1])
    blobs.put([b"bytes"])
    # fsync_dir syncs too: bytes; the name; at once the blob's folder and the folder of folders
    assert calls[:2] == ["fsync", "replace"]
    assert sorted(calls[2:]) == ["fsync", "fsync", "fsync_dir", "fsync_dir"]


def test_a_present_blob_has_its_folder_synced_again(blobs: BlobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    (digest,) = blobs.put([b"bytes"])
    synced: list[Path] = []
    monkeypatch.setattr(fs, "fsync_dir", synced.append)
    blobs.put([b"bytes"])
    assert digest[0] in {path.name for path in synced}


@pytest.mark.parametrize("wrong", [b"", b"byte", b"bytes!", b"bytez"])
def test_a_damaged_blob_is_not_read(blobs: BlobStore, tmp_path: Path, wrong: bytes) -> None:
    (digest,) = blobs.put([b"bytes"])
    damage(path_of(tmp_path, digest), wrong)
    with pytest.raises(DamagedBlob) as caught:
        blobs.read(digest)
    assert caught.value.path == path_of(tmp_path, digest)
    assert not blobs.is_intact(digest)


@pytest.mark.parametrize("wrong", [b"", b"byte", b"bytes!", b"bytez"])
def test_putting_the_bytes_again_heals_a_damaged_blob(blobs: BlobStore, tmp_path: Path, wrong: bytes) -> None:
    (digest,) = blobs.put([b"bytes"])
    damage(path_of(tmp_path, digest), wrong)
    blobs.put([b"bytes"])
    assert blobs.read(digest) == b"bytes"


def test_damage_beyond_the_first_megabyte_is_healed_too(blobs: BlobStore, tmp_path: Path) -> None:
    data = bytes(2_500_000)
    (digest,) = blobs.put([data])
    damage(path_of(tmp_path, digest), data[:-1] + b"\1")
    blobs.put([data])
    assert blobs.is_intact(digest)


@settings(max_examples=60)
@given(bit=st.integers(0, 8 * 64 - 1))
def test_every_flipped_bit_is_found(tmp_path_factory: pytest.TempPathFactory, bit: int) -> None:
    root = tmp_path_factory.getbasetemp() / "flips"
    blobs = make_blobs(root)
    data = bytearray(range(64))
    (digest,) = blobs.put([data])
    data[bit // 8] ^= 1 << bit % 8
    damage(path_of(root, digest), bytes(data))
    with pytest.raises(DamagedBlob):
        blobs.read(digest)


@pytest.mark.parametrize("ask", [BlobStore.read, BlobStore.size])
def test_a_missing_blob_is_named(blobs: BlobStore, ask: object) -> None:
    assert callable(ask)
    with pytest.raises(MissingBlob, match="ab" * 32):
        ask(blobs, "ab" * 32)


def test_foreign_files_among_the_blobs_are_not_blobs(blobs: BlobStore, tmp_path: Path) -> None:
    (digest,) = blobs.put([b"bytes"])
    (tmp_path / "blobs" / "notes.txt").touch()
    (path_of(tmp_path, digest).parent / "notes.txt").touch()
    (path_of(tmp_path, digest).parent / ("f" * 64)).touch()
    assert list(blobs.digests()) == [digest]


def test_removing_says_what_it_freed(blobs: BlobStore) -> None:
    digests = blobs.put([b"1234", b"56"])
    assert blobs.unlink([*digests, "ab" * 32]) == 6
    assert list(blobs.digests()) == []


def test_a_blob_that_is_set_aside_is_kept_elsewhere(blobs: BlobStore) -> None:
    (digest,) = blobs.put([b"bytes"])
    place = blobs.set_aside(digest)
    assert place.read_bytes() == b"bytes"
    with pytest.raises(MissingBlob):
        blobs.read(digest)
