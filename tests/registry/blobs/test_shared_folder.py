"""Blobs in a folder that machines share: the promises of every place, whose it is, and what a lost lock may delete."""

from __future__ import annotations

import errno
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest

from registry import files as fs
from registry.errors import NotAStore, StoreUnavailable
from registry.storage.blobs.backend import BlobBackend
from registry.storage.blobs.content import Blobs, digest_of
from registry.storage.blobs.shared import SharedBackend
from registry.testing.blobs import ABSENT, BlobPromises

OWNER = "1" * 32


def claimed(folder: Path, owner: str = OWNER) -> SharedBackend:
    place = SharedBackend(folder, owner)
    place.claim()
    return place


class TestSharedFolder(BlobPromises):
    """Files in a folder that machines share."""

    @pytest.fixture(autouse=True)
    def factory(self, tmp_path_factory: pytest.TempPathFactory) -> None:
        self.folders = tmp_path_factory

    def new_place(self, same_as: BlobBackend | None = None) -> BlobBackend:
        return claimed(self.folders.mktemp("shared") if same_as is None else Path(same_as.home))

    def damage(self, place: BlobBackend, digest: str, data: bytes) -> None:
        path = Path(place.place(digest))
        path.chmod(0o644)
        path.write_bytes(data)


def test_two_stores_do_not_share_a_folder(tmp_path: Path) -> None:
    claimed(tmp_path / "blobs")
    with pytest.raises(NotAStore, match="another store"):
        claimed(tmp_path / "blobs", "2" * 32)


@pytest.mark.parametrize("has_links", [True, False])
def test_of_two_stores_that_claim_a_folder_at_once_one_gets_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_links: bool
) -> None:
    def no_links(*names: Path) -> None:
        raise PermissionError(errno.EPERM, "no hard links here")

    def claimed_meanwhile(path: Path, data: fs.Bytes, mode: int) -> None:
        monkeypatch.setattr(fs, "write_file", write)
        claimed(tmp_path / "blobs", "2" * 32)
        write(path, data, mode)

    write = fs.write_file
    monkeypatch.setattr(fs, "write_file", claimed_meanwhile)
    if not has_links:
        monkeypatch.setattr(os, "link", no_links)
    with pytest.raises(NotAStore, match="another store"):
        claimed(tmp_path / "blobs")
    claimed(tmp_path / "blobs", "2" * 32)


def test_many_that_claim_a_folder_for_one_store_all_may(tmp_path: Path) -> None:
    def claim(folder: Path, together: Barrier) -> None:
        together.wait()
        claimed(folder)

    with ThreadPoolExecutor(4) as pool:
        for turn in range(50):
            list(pool.map(claim, [tmp_path / str(turn)] * 4, [Barrier(4)] * 4))


def test_a_folder_that_holds_other_things_is_refused(tmp_path: Path) -> None:
    (tmp_path / "letters").mkdir()
    with pytest.raises(NotAStore, match="letters"):
        claimed(tmp_path)


def test_a_folder_that_was_claimed_by_half_is_claimed_again(tmp_path: Path) -> None:
    claimed(tmp_path / "blobs")
    (tmp_path / "blobs" / "owner").unlink()
    claimed(tmp_path / "blobs")


def test_what_is_in_a_folder_that_is_not_mounted_is_away_and_not_missing(tmp_path: Path) -> None:
    place = claimed(tmp_path / "blobs")
    digest = Blobs(place).put(b"bytes")
    shutil.rmtree(tmp_path / "blobs")
    (tmp_path / "blobs").mkdir()
    uses = (place.exists, place.size, place.get, place.delete)
    for use in (*(lambda use=use: use(digest) for use in uses), place.now, lambda: list(place.all())):
        with pytest.raises(StoreUnavailable):
            use()
    with pytest.raises(StoreUnavailable):
        Blobs(place).put(b"more")


def test_bytes_that_are_written_again_are_young_so_that_nobody_deletes_them(tmp_path: Path) -> None:
    place, long_ago = claimed(tmp_path / "blobs"), time.time() - 10_000
    blobs = Blobs(place)
    digest = blobs.put(b"bytes")
    os.utime(place.place(digest), (long_ago, long_ago))
    blobs.put(b"bytes")
    assert blobs.delete([digest]) == 0
    os.utime(place.place(digest), (long_ago, long_ago))
    assert blobs.delete([digest]) == len(b"bytes")


def test_a_blob_that_nobody_has_is_no_error_of_the_folder(tmp_path: Path) -> None:
    place = claimed(tmp_path / "blobs")
    assert not place.exists(ABSENT)
    with pytest.raises(FileNotFoundError):
        place.size(digest_of(b"nothing"))
