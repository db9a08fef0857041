"""A store whose blobs are in an object store: every command works on it, and what was read once is here."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from registry.errors import DamagedStore, NotAStore, StoreUnavailable
from registry.storage.blobs.place import remote_blobs
from registry.storage.paths import StorePaths
from registry.store import Store
from tests.cli.conftest import Ran
from tests.cli.tiny_fleet import LABEL, train_store
from tests.s3_faults import Fault, FaultyServer, refuses
from tests.s3_server import S3Server

pytestmark = pytest.mark.usefixtures("s3_environment")
Icm = Callable[..., Ran]


@pytest.fixture
def server(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyServer]:
    """What the client takes for the server."""
    from registry.storage.blobs import objects

    monkeypatch.setattr(objects, "_DEADLINE", 1.5)
    with FaultyServer(s3.endpoint).running() as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.endpoint)
        yield server


@pytest.fixture
def store(mixed_template: Path, tmp_path: Path, icm: Icm) -> Path:
    """An empty store whose blobs are far away, and the fleet of the template beside it."""
    shutil.copytree(mixed_template / "loras", tmp_path / "loras")
    root = tmp_path / "store"
    Store.open(root, create=True, blobs=f"s3://icm/{uuid4().hex}").close()
    assert icm("base", "add", LABEL, mixed_template / "base").code == 0
    return root


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_whole_way_of_a_fleet(store: Path, tmp_path: Path, icm: Icm) -> None:
    assert icm("ingest", tmp_path / "loras", "--device", "cpu").code == 0
    train_store(store)
    names = icm("ls", "-q").out.split()
    assert len(names) > 1
    assert icm("materialize", names[0], "-o", tmp_path / "one").code == 0
    assert icm("materialize", names[0], "--source", "original", "-o", tmp_path / "original").code == 0
    evicted = icm("evict", names[1], "--max-error", "10")
    assert evicted.code == 0, evicted.err
    assert icm("materialize", names[1], "-o", tmp_path / "two").code == 0
    for command in (
        ["stats"],
        ["show", names[0]],
        ["verify", "--read-data", "--decode"],
        ["prune", "--yes"],
        ["doctor"],
    ):
        assert icm(*command).code == 0, command
    assert not any((store / "blobs").iterdir())
    document = icm("stats", "--json").document
    assert document
    with Store.open(store) as opened:
        assert opened.usage().total > 0
        assert {blob.digest for blob in opened.blobs.all()}


def test_a_second_request_for_a_task_needs_no_network(
    store: Path, tmp_path: Path, icm: Icm, server: FaultyServer
) -> None:
    assert icm("ingest", tmp_path / "loras", "--no-vectors").code == 0
    train_store(store)
    name = icm("ls", "-q").out.split()[0]
    assert icm("materialize", name, "-o", tmp_path / "first").code == 0
    server.faults = [Fault("", float("inf"), before=refuses(503))]
    server.requests.clear()
    assert icm("materialize", name, "-o", tmp_path / "second").code == 0
    assert server.requests == []
    assert files(tmp_path / "first") == files(tmp_path / "second")


def test_while_the_bucket_is_away_nothing_is_written_and_one_error_says_so(
    store: Path, tmp_path: Path, icm: Icm, server: FaultyServer
) -> None:
    server.faults = [Fault("", float("inf"), before=refuses(503))]
    ran = icm("ingest", tmp_path / "loras", "--no-vectors", "--json")
    assert ran.code == 18
    assert "s3://icm/" in ran.error["message"]
    server.faults = []
    assert icm("ls", "-q").out.split() == []
    assert icm("ingest", tmp_path / "loras", "--no-vectors").code == 0
    assert icm("verify", "--read-data").code == 0


def test_an_evicted_original_stays_for_a_day(store: Path, tmp_path: Path, icm: Icm) -> None:
    assert icm("ingest", tmp_path / "loras", "--no-vectors").code == 0
    train_store(store)
    name = icm("ls", "-q").out.split()[0]
    with Store.open(store) as opened:
        weights = opened.task(name).final.weights
    assert icm("evict", name, "--max-error", "10").code == 0
    with Store.open(store) as opened:
        assert opened.task(name).final.is_evicted
        assert opened.blobs.exists(weights)
    assert icm("prune", "--yes").code == 0
    with Store.open(store) as opened:
        assert opened.blobs.exists(weights)
        opened.prune(grace=0)
        assert not opened.blobs.exists(weights)


@pytest.mark.usefixtures("two_threads")  # a copy of this process could not reach the bucket
def test_what_two_processes_would_check_one_checks(store: Path, tmp_path: Path, icm: Icm) -> None:
    assert icm("ingest", tmp_path / "loras", "--no-vectors").code == 0
    train_store(store)
    ran = icm("evict", "--max-error", "10", "--json")
    assert ran.code == 0, ran.err
    with Store.open(store) as opened:
        assert sum(row.evicted_at is not None for row in opened.rows()) > 1
    assert icm("verify", "--read-data").code == 0


def test_two_stores_do_not_share_a_prefix(tmp_path: Path) -> None:
    address = f"s3://icm/{uuid4().hex}"
    Store.open(tmp_path / "one", create=True, blobs=address).close()
    with pytest.raises(NotAStore, match="another store"):
        Store.open(tmp_path / "two", create=True, blobs=address)
    Store.open(tmp_path / "one", create=True, blobs=address).close()


def test_a_store_that_was_half_made_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    address = f"s3://icm/{uuid4().hex}"
    with monkeypatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
        from registry.storage.blobs import objects

        patch.setattr(objects, "_DEADLINE", 0.2)
        with pytest.raises(StoreUnavailable):
            Store.open(tmp_path / "store", create=True, blobs=address)
    with Store.open(tmp_path / "store", create=True, blobs=address) as store:
        assert store.blobs.read(store.blobs.put(b"bytes")) == b"bytes"


@pytest.mark.parametrize("text", ["", "{}", "[]", "null", "\xff", '{"place": "s3://icm/x"}'])
def test_a_damaged_address_is_told(tmp_path: Path, text: str) -> None:
    root = tmp_path / "store"
    Store.open(root, create=True, blobs=f"s3://icm/{uuid4().hex}").close()
    place = StorePaths(root).place
    place.chmod(0o644)
    place.write_text(text)
    with pytest.raises(DamagedStore, match="BLOBS is damaged"):
        remote_blobs(StorePaths(root))
    place.unlink()
    with pytest.raises(DamagedStore, match="FORMAT and BLOBS in "):
        Store.open(root)


@pytest.fixture
def coded(store: Path, tmp_path: Path, icm: Icm, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store with codes; what its training has left is set aside."""
    assert icm("ingest", tmp_path / "loras", "--no-vectors").code == 0
    train_store(store)
    with monkeypatch.context() as patch:
        ages(patch)
        assert icm("prune", "--yes").code == 0
    return store


def ages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let everything that was written be older than the grace of an object store."""
    from registry.storage.blobs import objects

    monkeypatch.setattr(objects.ObjectBackend, "grace", -60.0)


def test_evict_says_what_goes_later_and_prune_deletes_it(
    coded: Path, tmp_path: Path, icm: Icm, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Store.open(coded) as opened:
        weights = opened.task("rules").final.weights
        size = opened.blobs.size(weights)
    task, summary = icm("evict", "rules", "--max-error", "10", "--json").events
    assert (task["freed"], summary["freed"], summary["pending"]) == (size, 0, size)
    assert icm("evict", "rules", "--max-error", "10", "--json").events[0]["status"] == "known"
    assert icm("prune", "--yes", "--json").document["size"] == 0
    ages(monkeypatch)
    pruned = icm("prune", "--yes", "--json").document
    assert pruned["blobs"] == 1
    assert pruned["size"] >= size
    with Store.open(coded) as opened:
        assert not opened.blobs.exists(weights)
    assert icm("materialize", "rules", "-o", tmp_path / "out").code == 0
    assert icm("verify", "--read-data").code == 0
