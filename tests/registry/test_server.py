"""A store in PostgreSQL is created once, records the address of its bytes, and is refused with another address."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from registry.errors import DamagedStore, NotAStore, StoreNotFound, StoreTooNew, StoreTooOld, StoreUnavailable
from registry.names import DatabaseUrl
from registry.storage.blobs.shared import SharedBackend
from registry.storage.locks import Deadline
from registry.store import Store
from tests.pg_server import new_database
from tests.registry.examples import ingest


@pytest.fixture
def url(postgres: str) -> str:
    return new_database(postgres)


def made(url: str, blobs: Path) -> Store:
    return Store.open(url, create=True, blobs=str(blobs))


def execute(url: str, statement: str) -> None:
    import psycopg

    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(statement)


def test_everybody_else_needs_the_address_alone(url: str, tmp_path: Path) -> None:
    with made(url, tmp_path / "blobs") as store:
        ingest(store, "rust")
    with Store.open(url) as store:
        assert store.blobs.read(store.task("rust").final.weights) == b"weights of rust"
        assert store.blobs.home == str(tmp_path / "blobs")
        assert list(store.verify(read_data=True)) == []


@pytest.mark.parametrize("create", [False, True])
def test_an_empty_database_is_no_store_unless_it_is_said_where_the_bytes_are_to_be(url: str, create: bool) -> None:
    with pytest.raises(StoreNotFound) as error:
        Store.open(url, create=create)
    assert "icm init" in (error.value.hint or "")


def test_a_store_that_is_made_again_is_found(url: str, tmp_path: Path) -> None:
    with made(url, tmp_path / "blobs") as store:
        ingest(store, "rust")
    with made(url, tmp_path / "blobs") as store:
        assert store.names() == ["rust"]


def test_a_store_does_not_move_its_bytes(url: str, tmp_path: Path) -> None:
    made(url, tmp_path / "blobs").close()
    with pytest.raises(NotAStore, match="with its files at"):
        made(url, tmp_path / "elsewhere")
    assert not (tmp_path / "elsewhere").exists()


def test_what_is_no_place_for_bytes_leaves_the_database_as_it_was(url: str) -> None:
    with pytest.raises(NotAStore):
        Store.open(url, create=True, blobs="relative/folder")
    with pytest.raises(StoreNotFound):
        Store.open(url)


def test_many_that_make_one_store_at_once_make_one(url: str, tmp_path: Path) -> None:
    def one(number: int) -> None:
        with made(url, tmp_path / "blobs") as store:
            ingest(store, f"task-{number}")

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(one, range(4)))
    with Store.open(url) as store:
        assert store.count() == 4


def test_a_store_that_was_half_made_is_made_again(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(backend: SharedBackend) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(SharedBackend, "claim", killed)
        with pytest.raises(KeyboardInterrupt):
            made(url, tmp_path / "blobs")
    with pytest.raises(StoreUnavailable), Store.open(url) as store:
        store.blobs.put(b"bytes")
    with made(url, tmp_path / "blobs") as store:
        ingest(store, "rust")


@pytest.mark.parametrize("change", ["blobs = blobs || 'x'", "store = reverse(store)"])
def test_an_address_that_has_changed_on_its_own_is_not_followed(url: str, tmp_path: Path, change: str) -> None:
    with made(url, tmp_path / "blobs") as store:
        ingest(store, "rust")
    execute(url, f"UPDATE meta SET {change}")
    with pytest.raises((NotAStore, StoreUnavailable)), Store.open(url) as store:
        ingest(store, "html")


def test_a_database_of_icm_0_x_is_refused_in_one_sentence(url: str, tmp_path: Path) -> None:
    for table in ("alembic_version", "task_vectors"):
        execute(url, f"CREATE TABLE {table} (number int)")
    for create in (False, True):
        with pytest.raises(StoreTooOld, match=r"was created by icm 0\.x, which this version does not read"):
            Store.open(url, create=create, blobs=str(tmp_path / "blobs") if create else None)


def test_lost_tables_are_rebuilt(url: str, tmp_path: Path) -> None:
    with made(url, tmp_path / "blobs") as store:
        ingest(store, "rust")
    execute(url, "DROP TABLE refs")
    with Store.open(url) as store:
        with pytest.raises(DamagedStore, match="refs"):
            store.names()
        assert store.rebuild().tasks == 1
        assert store.blobs.read(store.task("rust").final.weights) == b"weights of rust"


@pytest.mark.parametrize("create", [False, True])
def test_a_store_of_a_newer_icm_is_refused(url: str, tmp_path: Path, create: bool) -> None:
    made(url, tmp_path / "blobs").close()
    execute(url, "UPDATE meta SET format = 2")
    execute(url, "ALTER TABLE meta DROP COLUMN seq")
    with pytest.raises(StoreTooNew, match="has format 2"):
        Store.open(url, create=create, blobs=str(tmp_path / "blobs") if create else None)


@pytest.mark.parametrize("create", [False, True])
def test_a_store_that_does_not_know_its_number_is_rebuilt_in_a_folder(url: str, tmp_path: Path, create: bool) -> None:
    blobs = tmp_path / "blobs"
    with made(url, blobs) as store:
        ingest(store, "rust")
    execute(url, "DELETE FROM meta")
    with pytest.raises(DamagedStore, match="does not identify its store") as error:
        Store.open(url, create=create, blobs=str(blobs) if create else None)
    assert "icm init STORE --blobs LOCATION --recover" in str(error.value.hint)
    Store.open(tmp_path / "folder", create=True).close()
    for part in ("blobs", "manifests"):
        shutil.copytree(blobs / part, tmp_path / "folder" / part, dirs_exist_ok=True)
    with Store.open(tmp_path / "folder") as store:
        assert store.rebuild().tasks == 1
        assert list(store.verify(read_data=True)) == []


def test_who_writes_is_seen_by_those_who_serve_once_it_is_committed(url: str, tmp_path: Path) -> None:
    from registry.storage.locks import Deadline
    from registry.storage.postgres import PostgresDatabase

    watching = PostgresDatabase(DatabaseUrl(url), command="watch", read_only=True, deadline=Deadline(1.0))
    with made(url, tmp_path / "blobs") as store:
        before = watching.changes()
        store.blobs.put(b"bytes")
        store.count()
        assert watching.changes() == before
        ingest(store, "rust")
        assert watching.changes() > before
    watching.close()


def test_what_a_server_refuses_for_good_is_told_at_once(url: str) -> None:
    deadline = Deadline(30.0)
    with pytest.raises(StoreUnavailable, match="does not exist"):
        Store.open(url.replace("/icm_", "/no_"), deadline=deadline)
    assert deadline.left == 30.0
