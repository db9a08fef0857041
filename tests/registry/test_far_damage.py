"""A machine with cached files finds and repairs damage in remote storage."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from registry.manifests import Task
from registry.store import Store
from tests.registry.examples import ingest
from tests.registry.pairs import overwrite

pytestmark = pytest.mark.kept_in("sqlite", "folder", reason="makes its own store")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """A store whose files are in a shared folder, with a cache."""
    far, cache = tmp_path / "far", tmp_path / "cache"
    Store.open(tmp_path / "store", create=True, blobs=str(far)).close()
    with Store.open(tmp_path / "store", cache=lambda: cache) as opened:
        yield opened


@pytest.fixture
def rust(store: Store) -> Task:
    """A task that has been read."""
    known = ingest(store, "rust")
    store.task("rust")
    store.blobs.read(known.final.weights)
    return known


def scramble(data: bytes) -> bytes:
    return bytes(reversed(data))


@pytest.mark.parametrize("is_manifest", [True, False])
def test_the_copy_repairs_any_damage(store: Store, rust: Task, is_manifest: bool) -> None:
    digest = str(rust.manifest if is_manifest else rust.final.weights)
    overwrite(store, digest, scramble)
    (finding,) = store.verify(read_data=True)
    assert (finding.kind, finding.digest, finding.tasks) == ("digest", digest, ("rust",))
    assert str(store.repair(finding)).startswith("corrected with the copy in the cache")
    assert list(store.verify(read_data=True)) == []
