"""Evicted originals: manifests say so first, files are freed after, and nothing else loses any."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from registry.errors import MissingBlob, StoreFull
from registry.manifests import Task
from registry.reachability import count_uses
from registry.store import Store
from tests.registry.children import KILLED, run
from tests.registry.examples import evict, ingest, new_store, put, task, train
from tests.registry.pairs import damage
from tests.shared import paths_of

IN_FOLDER = pytest.mark.kept_in("sqlite", "folder", reason="elsewhere bytes are deleted once they are old")


@pytest.fixture
def rust(store: Store) -> Task:
    """A task with one checkpoint and a code."""
    ingest(store, "rust", steps=[80])
    train(store, ["rust"])
    return store.task("rust")


@IN_FOLDER
def test_the_weights_are_freed_and_everything_else_stays(store: Store, rust: Task) -> None:
    task = evict(store, "rust")
    final = task.final
    assert (final.is_evicted, final.layout, final.weights.size) == (True, rust.final.layout, rust.final.weights.size)
    assert final.stored_bytes == final.original_bytes - final.weights.size
    assert store.blobs.read(final.config) == b'{"r": 8}'
    with pytest.raises(MissingBlob):
        store.blobs.read(final.weights)
    assert list(store.verify(read_data=True)) == []
    assert store.rebuild().tasks == 1
    assert store.task("rust").final.is_evicted


@IN_FOLDER
def test_shared_weights_are_freed_with_the_last_task_that_has_them(store: Store) -> None:
    weights = ingest(store, "rust", weights=b"shared").final.weights
    ingest(store, "html", weights=b"shared")
    assert count_uses(store)[weights] == 2
    evict(store, "rust")
    assert store.blobs.read(weights) == b"shared"
    evict(store, "html")
    assert not store.blobs.exists(weights)


@IN_FOLDER
def test_shared_weights_are_freed_with_the_last_version_that_has_them(store: Store) -> None:
    first = ingest(store, "rust", weights=b"shared")
    final = replace(first.final, config=put(store, b'{"r": 9}'))
    store.publish([replace(first, version=2, final=final)])
    evict(store, "rust@1")
    assert (store.task("rust").final.is_evicted, store.task("rust@1").final.is_evicted) == (False, True)
    assert store.blobs.read(final.weights) == b"shared"
    evict(store, "rust@2")
    assert not store.blobs.exists(final.weights)
    assert list(store.verify(read_data=True)) == []


@IN_FOLDER
def test_an_earlier_version_is_evicted_alone(store: Store) -> None:
    first = ingest(store, "rust")
    store.publish([replace(first, version=2, final=task(store, "rust", weights=b"second").final)])
    evict(store, "rust@1")
    assert not store.blobs.exists(first.final.weights)
    assert [one.final.is_evicted for one in store.history("rust")] == [True, False]
    assert next(store.rows()).evicted_at is None


@IN_FOLDER
def test_the_bill_counts_the_files(store: Store, rust: Task) -> None:
    evict(store, "rust")
    usage = store.usage()
    assert (usage.originals, usage.checkpoints) == (rust.final.config.size, 0)


@pytest.mark.parametrize("point", ["blobs-durable", "rows-before-commit", "rows-committed", "blob-unlinked"])
@IN_FOLDER
def test_a_kill_leaves_a_whole_task(store: Store, rust: Task, point: str) -> None:
    address = store.address
    store.close()

    def work() -> None:
        with new_store(address) as child:
            evict(child, "rust")

    assert run(work, failpoint=point) == KILLED
    with new_store(address) as opened:
        found = opened.task("rust")
        for one in found.adapters:
            assert one.is_evicted or opened.blobs.exists(one.weights)
        assert [finding for finding in opened.verify(read_data=True) if finding.is_problem] == []
        evict(opened, "rust")
        opened.prune(grace=0)
        assert not any(opened.blobs.exists(one.weights) for one in found.adapters)
        assert list(opened.verify(read_data=True)) == []


@IN_FOLDER
def test_a_full_disk_has_room_for_an_eviction(store: Store, rust: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    reserve, real = paths_of(store).reserve, type(store.parts.database).write

    def write(database: object) -> object:
        if reserve.exists():
            raise StoreFull("database or disk is full")
        return real(database)  # type: ignore[arg-type]

    monkeypatch.setattr(type(store.parts.database), "write", write)
    store.parts.maintenance.run(lambda: evict(store, "rust"))
    assert reserve.exists()
    assert not store.blobs.exists(rust.final.weights)


@IN_FOLDER
def test_nothing_is_freed_while_the_database_is_wrong(store: Store, rust: Task) -> None:
    damage(store, "UPDATE refs SET gain = 0.5 WHERE kind = 'task'")
    ingest(store, "html")
    with pytest.raises(Exception, match="deletes nothing"):
        store.free([rust.final.weights])
    assert Path(store.blobs.place(rust.final.weights)).exists()
