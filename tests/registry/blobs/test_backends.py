"""Every place for blobs keeps the promises of `registry.testing.blobs`; the store works on any."""

from __future__ import annotations

from pathlib import Path

import pytest

from registry.storage.blobs.backend import BlobBackend
from registry.storage.blobs.local import LocalBackend
from registry.storage.paths import StorePaths, make_folders
from registry.store import Store
from registry.testing.blobs import ABSENT, BlobPromises
from tests.registry.blobs.in_memory import MemoryBackend
from tests.registry.examples import ingest, train
from tests.shared import paths_of


class TestFolder(BlobPromises):
    """Files in a folder."""

    @pytest.fixture(autouse=True)
    def factory(self, tmp_path_factory: pytest.TempPathFactory) -> None:
        self.folders = tmp_path_factory

    def new_place(self, same_as: BlobBackend | None = None) -> BlobBackend:
        root = self.folders.mktemp("place") if same_as is None else Path(same_as.place(ABSENT)).parents[2]
        paths = StorePaths(root)
        make_folders(paths)
        return LocalBackend(paths)

    def damage(self, place: BlobBackend, digest: str, data: bytes) -> None:
        path = Path(place.place(digest))
        path.chmod(0o644)
        path.write_bytes(data)


class TestMemory(BlobPromises):
    """A dictionary, for tests."""

    is_remote = False

    def new_place(self, same_as: BlobBackend | None = None) -> BlobBackend:
        if same_as is not None:
            return same_as
        place = MemoryBackend()
        place.is_remote = self.is_remote
        return place

    def damage(self, place: BlobBackend, digest: str, data: bytes) -> None:
        assert isinstance(place, MemoryBackend)
        place.kept[digest] = data


class TestRemoteMemory(TestMemory):
    """The same, with each call going through a network."""

    is_remote = True


def test_a_store_works_on_another_backend(tmp_path: Path) -> None:
    blobs, manifests = MemoryBackend(), MemoryBackend()
    root = tmp_path / "store"
    with Store.open(root, create=True, backends=(blobs, manifests)) as store:
        ingest(store, "rust", steps=[80])
        ingest(store, "html")
        train(store, ["rust"])
        assert store.blobs.read(store.task("rust").final.weights) == b"weights of rust"
        assert list(store.verify(read_data=True)) == []
        assert not list(paths_of(store).blobs.iterdir())
        assert not list(paths_of(store).manifests.iterdir())
    with Store.open(root, backends=(blobs, manifests)) as store:
        store.remove(store.named(["html"]))
        assert store.prune(grace=0).blobs == 1
        assert store.usage().codes == len(b"code of rust")
        weights = str(store.task("rust").final.weights)
        blobs.kept[weights] = b"weights of rusk, and more"
        (finding,) = store.verify(read_data=True)
        assert (finding.kind, finding.path, finding.tasks) == ("length", f"memory:{weights}", ("rust",))
        store.repair(finding)
        assert list(blobs.damaged.values()) == [b"weights of rusk, and more"]
