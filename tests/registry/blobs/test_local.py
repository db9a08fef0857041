"""Blobs in a local folder: file locations, order of syncs, and permissions."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from registry import files as fs
from registry.errors import DamagedBlob
from registry.storage.blobs.content import Blobs
from registry.storage.blobs.local import LocalBackend
from registry.storage.paths import StorePaths, make_folders


@pytest.fixture
def blobs(tmp_path: Path) -> Blobs:
    make_folders(StorePaths(tmp_path))
    return Blobs(LocalBackend(StorePaths(tmp_path)))


def path_of(root: Path, digest: str) -> Path:
    return Path(StorePaths(root).file("blobs", digest))


def test_nothing_is_left_in_tmp(blobs: Blobs, tmp_path: Path) -> None:
    blobs.put_all([b"one", b"two", b"one"])
    assert list((tmp_path / "tmp").iterdir()) == []


def test_equal_bytes_are_written_once(blobs: Blobs, monkeypatch: pytest.MonkeyPatch) -> None:
    blobs.put(b"bytes")
    monkeypatch.setattr(fs, "write_file", lambda *_: pytest.fail("it was written again"))
    blobs.put(b"bytes")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_in_place_of_a_blob_is_damage_that_storing_it_again_repairs(blobs: Blobs, tmp_path: Path) -> None:
    path = path_of(tmp_path, blobs.put(b"bytes"))
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(DamagedBlob):
        blobs.read(path.name)
    assert not blobs.is_intact(path.name)
    assert blobs.put(b"bytes") == path.name
    assert blobs.read(path.name) == b"bytes"


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_a_blob_is_read_only_within_the_umask(blobs: Blobs, tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        digest = blobs.put(b"bytes")
    finally:
        os.umask(before)
    assert stat.S_IMODE(path_of(tmp_path, digest).stat().st_mode) == 0o444 & ~mask


def test_each_name_follows_a_sync_of_its_bytes_and_precedes_one_of_its_folder(
    blobs: Blobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    for name in ("fsync", "replace", "fsync_dir"):
        real = getattr(fs, name)
        monkeypatch.setattr(fs, name, lambda *a, real=real, name=name: (calls.append(name), real(*a))[1])
    blobs.put(b"bytes")
    # fsync_dir syncs too: bytes; the name; at once the blob's folder and the folder of folders
    assert calls[:2] == ["fsync", "replace"]
    assert sorted(calls[2:]) == ["fsync", "fsync", "fsync_dir", "fsync_dir"]


def test_a_batch_syncs_each_folder_once(blobs: Blobs, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[Path] = []
    monkeypatch.setattr(fs, "fsync_dir", synced.append)
    blobs.put_all([bytes([n]) for n in range(200)])
    assert len(synced) == len(set(synced)) == 17


def test_a_present_blob_has_its_folder_synced_again(blobs: Blobs, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = blobs.put(b"bytes")
    synced: list[Path] = []
    monkeypatch.setattr(fs, "fsync_dir", synced.append)
    blobs.put(b"bytes")
    assert digest[0] in {path.name for path in synced}


def test_damage_beyond_the_first_megabyte_is_healed_too(blobs: Blobs, tmp_path: Path) -> None:
    data = bytes(2_500_000)
    path = path_of(tmp_path, blobs.put(data))
    path.chmod(0o644)
    path.write_bytes(data[:-1] + b"\1")
    assert blobs.is_intact(blobs.put(data))


def test_foreign_files_among_the_blobs_are_not_blobs(blobs: Blobs, tmp_path: Path) -> None:
    digest = blobs.put(b"bytes")
    (tmp_path / "blobs" / "notes.txt").touch()
    (path_of(tmp_path, digest).parent / "notes.txt").touch()
    (path_of(tmp_path, digest).parent / ("f" * 64)).touch()
    assert [blob.digest for blob in blobs.all()] == [digest]


def test_a_blob_in_quarantine_keeps_its_bytes(blobs: Blobs, tmp_path: Path) -> None:
    place = Path(blobs.quarantine(blobs.put(b"bytes")))
    assert place.read_bytes() == b"bytes"
    assert place.parent == tmp_path / "quarantine"
