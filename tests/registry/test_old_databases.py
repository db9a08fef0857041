"""After using an old copy of the database, later records are neither deleted nor permanently hidden."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from registry.manifests import Task
from registry.store import Store
from tests.registry.examples import evict, ingest, task, train
from tests.shared import paths_of

pytestmark = pytest.mark.kept_in("sqlite", "folder", reason="copies the file of the database; weights go at once")


def use_old_database(store: Store, work: Callable[[], object]) -> None:
    """Do some work, then go back to the database of before, change the task and prune."""
    path = paths_of(store).database
    old = path.read_bytes()
    work()
    path.write_bytes(old)
    store.update("rust", lambda known: replace(known, note="seen"))
    store.prune(grace=0)


def rebuilt(store: Store) -> Task:
    """Find the old database, rebuild it, and return the task."""
    assert [one.kind for one in store.verify() if one.is_problem and one.kind != "missing"] == ["unlisted"]
    assert store.rebuild().restored == ("rust",)
    store.prune(grace=0)
    assert list(store.verify(read_data=True)) == []
    return store.task("rust")


def test_a_code_that_is_the_only_copy_stays(store: Store) -> None:
    ingest(store, "rust")

    def encode_and_evict() -> None:
        train(store, ["rust"])
        evict(store, "rust")

    use_old_database(store, encode_and_evict)
    found = rebuilt(store)
    assert (found.final.is_evicted, found.note) == (True, "seen")
    assert found.code is not None
    assert store.blobs.read(found.code.blob) == b"code of rust"


def test_a_new_version_stays(store: Store) -> None:
    first = ingest(store, "rust")
    final = task(store, "rust", weights=b"better weights").final
    use_old_database(store, lambda: store.publish([replace(first, version=2, final=final)]))
    assert rebuilt(store).version == 2
    assert [one.note for one in store.history("rust")] == ["seen", None]
    assert store.blobs.read(final.weights) == b"better weights"
