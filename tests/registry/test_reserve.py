"""A full disk can be emptied."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from registry import files as fs
from registry.errors import StoreFull
from registry.storage.folder import RESERVE_BYTES, FolderMaintenance, make_reserve
from registry.storage.sqlite import SqliteDatabase
from registry.store import Store
from tests.registry.examples import ingest
from tests.shared import paths_of

pytestmark = pytest.mark.kept_in("sqlite", "folder", reason="the reserve file of a store folder")


@pytest.fixture
def full_disk(store: Store, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make commits fail as on a full disk for as long as the reserve is there."""
    real = SqliteDatabase.write

    def write(database: SqliteDatabase) -> object:
        if paths_of(store).reserve.exists():
            raise StoreFull("database or disk is full")
        return real(database)

    monkeypatch.setattr(SqliteDatabase, "write", write)
    return paths_of(store).reserve


def test_a_new_store_has_a_reserve_of_real_bytes(store: Store) -> None:
    status = paths_of(store).reserve.stat()
    assert status.st_size == RESERVE_BYTES
    assert status.st_blocks * 512 >= RESERVE_BYTES


def test_a_task_can_be_removed_from_a_full_disk(store: Store, full_disk: Path) -> None:
    paths_of(store).reserve.unlink()
    ingest(store, "rust")
    make_reserve(paths_of(store))
    store.remove(store.named(["rust"]))
    store.free(names=["rust"])
    assert store.names() == []
    assert full_disk.exists()


def test_a_full_disk_can_be_pruned(store: Store, full_disk: Path) -> None:
    digest = store.blobs.put(b"orphan")
    assert store.prune(grace=0).blobs == 1
    assert not Path(store.blobs.place(digest)).exists()
    assert full_disk.exists()


def test_the_reserve_is_given_up_only_for_a_full_disk(store: Store) -> None:
    def fail() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        FolderMaintenance(paths_of(store)).run(fail)
    assert paths_of(store).reserve.exists()


def test_a_disk_that_stays_full_is_an_error(store: Store) -> None:
    def fail() -> None:
        raise StoreFull("full")

    with pytest.raises(StoreFull):
        FolderMaintenance(paths_of(store)).run(fail)


def test_a_reserve_that_cannot_be_made_again_stops_nothing(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(fd: int, data: fs.Bytes) -> None:
        raise OSError(errno.ENOSPC, "no space left on device")

    paths_of(store).reserve.unlink()
    monkeypatch.setattr(fs, "write", fail)
    FolderMaintenance(paths_of(store)).after_deletion()
    assert not paths_of(store).reserve.exists()
    assert list(paths_of(store).tmp.iterdir()) == []
