"""Opening a store: creation, refusal of other folders, read-only use."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from registry import files as fs
from registry.errors import (
    DamagedStore,
    NotAStore,
    RegistryError,
    StoreLocked,
    StoreNotFound,
    StoreTooNew,
    StoreTooOld,
)
from registry.store import Store
from tests.registry.examples import ingest, new_store
from tests.registry.pairs import pair


@pytest.mark.kept_in("sqlite", reason="the files of a store folder")
def test_a_store_that_is_not_there_is_not_made_unasked(tmp_path: Path) -> None:
    with pytest.raises(StoreNotFound) as caught:
        Store.open(tmp_path / "store")
    assert caught.value.hint is not None
    assert not (tmp_path / "store").exists()


@pytest.mark.kept_in("sqlite", "folder", reason="the files of a store folder")
def test_a_store_is_made_with_its_parents(tmp_path: Path) -> None:
    new_store(tmp_path / "a" / "b" / "store").close()
    assert (tmp_path / "a" / "b" / "store" / "FORMAT").read_text() == "icm manifests 1\n"


def test_what_was_stored_is_there_when_it_is_opened_again(tmp_path: Path) -> None:
    with new_store(tmp_path / "store") as store:
        ingest(store, "shakespeare")
    with Store.open(pair.place_of(tmp_path / "store")[0]) as store:
        assert store.task("shakespeare").base_model == "example/base-model"


@pytest.mark.kept_in("sqlite", reason="the files of a store folder")
def test_a_folder_with_other_things_is_not_made_a_store(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(NotAStore, match=r"notes\.txt"):
        new_store(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.kept_in("sqlite", reason="the files of a store folder")
def test_a_store_that_another_process_makes_meanwhile_is_no_other_thing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, real = tmp_path / "store", Path.iterdir

    def iterdir(folder: Path) -> Iterator[Path]:
        monkeypatch.undo()  # the folder is listed once it is known to have no FORMAT
        new_store(root).close()
        return real(folder)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    with new_store(root) as store:
        ingest(store, "rust")


@pytest.mark.kept_in("sqlite", reason="the files of a store folder")
def test_an_unknown_format_is_refused(tmp_path: Path) -> None:
    new_store(tmp_path / "store").close()
    path = tmp_path / "store" / "FORMAT"
    path.unlink()
    path.write_text("icm manifests 2\n")
    with pytest.raises(StoreTooNew, match="icm manifests 2"):
        Store.open(tmp_path / "store")


@pytest.mark.parametrize(
    "text", [b"", b"icm manifestz 1\n", b"icm manifests 1", b"icm manifests 1\n\n", bytes(12), b"\xff" * 12]
)
@pytest.mark.kept_in("sqlite", reason="the files of a store folder")
def test_a_damaged_format_is_called_damaged_and_not_newer(tmp_path: Path, text: bytes) -> None:
    new_store(tmp_path / "store").close()
    path = tmp_path / "store" / "FORMAT"
    path.chmod(0o644)
    path.write_bytes(text)
    with pytest.raises(DamagedStore, match="damaged") as caught:
        Store.open(tmp_path / "store")
    assert "`icm manifests 1`" in (caught.value.hint or "")


@pytest.mark.parametrize("name", ["FORMAT", "registry.db", "lock"])
@pytest.mark.kept_in("sqlite", reason="the files of a store folder")
def test_a_folder_in_place_of_a_file_of_the_store_is_an_error_of_the_store(tmp_path: Path, name: str) -> None:
    new_store(tmp_path / "store").close()
    path = tmp_path / "store" / name
    path.unlink()
    path.mkdir()
    with pytest.raises(RegistryError):
        Store.open(tmp_path / "store")


@pytest.mark.parametrize("junk", [b"", b"\0" * 8192, b"this is a text file\n" * 500])
@pytest.mark.kept_in("sqlite", reason="the files of a store folder")
def test_a_database_that_is_none_is_damage(tmp_path: Path, junk: bytes) -> None:
    new_store(tmp_path / "store").close()
    (tmp_path / "store" / "registry.db").write_bytes(junk)
    with Store.open(tmp_path / "store") as store, pytest.raises(DamagedStore) as caught:
        store.names()
    assert "icm verify --repair" in (caught.value.hint or "")


@pytest.mark.kept_in("sqlite", reason="the files of a store folder")
def test_a_store_of_icm_0_x_is_refused_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "FORMAT").write_text("icm store 2\n")
    with pytest.raises(StoreTooOld, match=r"was created by icm 0\.x, which this version does not read"):
        Store.open(tmp_path / "store")


@pytest.mark.kept_in("sqlite", reason="the files of a store folder")
def test_two_stores_that_share_one_database_are_refused(tmp_path: Path) -> None:
    with new_store(tmp_path / "store") as store:
        ingest(store, "rust")
    shutil.copytree(tmp_path / "store", tmp_path / "copy", copy_function=os.link)
    for name in ("store", "copy"):
        with pytest.raises(NotAStore, match="shares its database with another store") as caught:
            Store.open(tmp_path / name)
        assert "cp -a" in (caught.value.hint or "")
    shutil.rmtree(tmp_path / "copy")
    with Store.open(tmp_path / "store") as store:
        assert store.names() == ["rust"]


@pytest.mark.kept_in("sqlite", reason="the files of a store folder")
def test_folders_that_a_copy_left_out_are_made_again(tmp_path: Path) -> None:
    new_store(tmp_path / "store").close()
    for name in ("tmp", "quarantine", "blobs", "manifests"):
        (tmp_path / "store" / name).rmdir()
    with new_store(tmp_path / "store") as store:
        assert store.blobs.read(store.blobs.put(b"bytes")) == b"bytes"


@pytest.mark.kept_in("sqlite", reason="the files of a store folder")
def test_a_disk_that_is_full_while_a_store_is_made_is_called_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(fd: int, data: fs.Bytes) -> None:
        raise OSError(28, "no space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(fs, "write", fail)
        with pytest.raises(RegistryError, match="no space"):
            new_store(tmp_path / "store")
    with new_store(tmp_path / "store") as store:
        assert list(store.verify()) == []


class TestReadOnly:
    """A store that is only looked at."""

    def test_it_reads(self, tmp_path: Path) -> None:
        with new_store(tmp_path / "store") as store:
            ingest(store, "shakespeare")
        with Store.open(pair.place_of(tmp_path / "store")[0], read_only=True) as store:
            assert store.names() == ["shakespeare"]
            assert store.blobs.read(store.task("shakespeare").final.weights) == b"weights of shakespeare"

    def test_it_is_not_made(self, tmp_path: Path) -> None:
        with pytest.raises(StoreNotFound):
            Store.open(pair.place_of(tmp_path / "store")[0], read_only=True, create=True)

    def test_it_holds_off_those_that_delete(self, tmp_path: Path) -> None:
        with new_store(tmp_path / "store", lock_timeout=0) as store:
            ingest(store, "shakespeare")
            with Store.open(pair.place_of(tmp_path / "store")[0], read_only=True), pytest.raises(StoreLocked):
                store.prune()
            store.prune()
