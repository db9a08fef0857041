"""What every blob backend must do, asked of the local folder and of one in memory."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from registry.errors import DamagedBlob, MissingBlob
from registry.storage.blobs.backend import BlobBackend
from registry.storage.blobs.content import Blobs, digest_of
from registry.storage.blobs.local import LocalBackend
from registry.storage.folder import StorePaths, make_folders
from registry.store import Store
from tests.registry.blobs.in_memory import MemoryBackend
from tests.registry.examples import generator, ingest

ABSENT = "ab" * 32


@pytest.fixture(params=["local", "memory"])
def backend(request: pytest.FixtureRequest, tmp_path: Path) -> BlobBackend:
    """An empty backend of each kind."""
    if request.param == "memory":
        return MemoryBackend()
    make_folders(StorePaths(tmp_path))
    return LocalBackend(StorePaths(tmp_path))


@pytest.fixture
def blobs(backend: BlobBackend) -> Blobs:
    return Blobs(backend)


def damage(backend: BlobBackend, digest: str, data: bytes) -> None:
    if isinstance(backend, MemoryBackend):
        backend.kept[digest] = data
        return
    path = Path(backend.place(digest))
    path.chmod(0o644)
    path.write_bytes(data)


def test_a_blob_is_named_by_the_sha256_of_its_bytes(blobs: Blobs) -> None:
    assert blobs.put(b"bytes") == hashlib.sha256(b"bytes").hexdigest()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(items=st.lists(st.binary(max_size=200), max_size=8))
def test_what_is_put_is_read_back_in_order(blobs: Blobs, items: list[bytes]) -> None:
    digests = blobs.put_all(items)
    assert [blobs.read(digest) for digest in digests] == items
    assert [blobs.size(digest) for digest in digests] == list(map(len, items))
    assert {blob.digest for blob in blobs.all()} >= {hashlib.sha256(item).hexdigest() for item in items}


def test_a_batch_says_which_bytes_are_new(backend: BlobBackend) -> None:
    with backend.batch() as batch:
        assert batch.put(digest_of(b"one"), b"one")
        assert not batch.put(digest_of(b"one"), b"one")
    with backend.batch() as batch:
        assert not batch.put(digest_of(b"one"), b"one")
        assert batch.put(digest_of(b"two"), b"two")


def test_a_batch_that_fails_leaves_nothing(backend: BlobBackend) -> None:
    def fail() -> None:
        with backend.batch() as batch:
            batch.put(digest_of(b"bytes"), b"bytes")
            raise LookupError

    with pytest.raises(LookupError):
        fail()
    assert list(backend.all()) == []
    assert not backend.exists(digest_of(b"bytes"))


def test_a_listing_has_names_sizes_and_times(blobs: Blobs) -> None:
    digests = blobs.put_all([b"1234", b"56"])
    listed = {blob.digest: blob for blob in blobs.all()}
    assert [listed[digest].size for digest in digests] == [4, 2]
    assert list(listed) == sorted(digests)
    assert all(abs(blob.modified - 1.8e9) < 1e9 for blob in listed.values())  # seconds of these years


@pytest.mark.parametrize("wrong", [b"", b"byte", b"bytes!", b"bytez"])
def test_a_damaged_blob_is_not_read(blobs: Blobs, backend: BlobBackend, wrong: bytes) -> None:
    digest = blobs.put(b"bytes")
    damage(backend, digest, wrong)
    with pytest.raises(DamagedBlob) as caught:
        blobs.read(digest)
    assert caught.value.path == backend.place(digest)
    assert not blobs.is_intact(digest)
    with pytest.raises(DamagedBlob):
        blobs.check(digest)


@pytest.mark.parametrize("wrong", [b"", b"byte", b"bytes!", b"bytez"])
def test_putting_the_bytes_again_heals_a_damaged_blob(blobs: Blobs, backend: BlobBackend, wrong: bytes) -> None:
    digest = blobs.put(b"bytes")
    damage(backend, digest, wrong)
    blobs.put(b"bytes")
    assert blobs.read(digest) == b"bytes"


@pytest.mark.one_case
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(bit=st.integers(0, 8 * 64 - 1))
def test_every_flipped_bit_is_found(blobs: Blobs, backend: BlobBackend, bit: int) -> None:
    data = bytearray(range(64))
    digest = blobs.put(data)
    data[bit // 8] ^= 1 << bit % 8
    damage(backend, digest, bytes(data))
    with pytest.raises(DamagedBlob):
        blobs.read(digest)


@pytest.mark.parametrize("ask", [Blobs.read, Blobs.size, Blobs.check, Blobs.is_intact])
def test_a_missing_blob_is_named(blobs: Blobs, ask: object) -> None:
    assert callable(ask)
    with pytest.raises(MissingBlob, match=ABSENT):
        ask(blobs, ABSENT)
    assert not blobs.exists(ABSENT)


def test_deleting_says_what_it_freed(blobs: Blobs) -> None:
    digests = blobs.put_all([b"1234", b"56"])
    assert blobs.delete([*digests, ABSENT]) == 6
    assert list(blobs.all()) == []


def test_a_blob_in_quarantine_is_not_read_any_more(blobs: Blobs, backend: BlobBackend) -> None:
    digest = blobs.put(b"bytes")
    assert digest in backend.quarantine(digest)
    assert list(blobs.all()) == []
    with pytest.raises(MissingBlob):
        blobs.read(digest)


def test_a_store_works_on_another_backend(tmp_path: Path) -> None:
    memory = MemoryBackend()
    root = tmp_path / "store"
    with Store.open(root, create=True, backend=memory) as store:
        ingest(store, "rust", steps=[80])
        ingest(store, "html")
        store.generators.add(generator(store, ["rust"]))
        assert store.blobs.read(store.tasks.final("rust").weights) == b"weights of rust"
        assert list(store.verify(read_data=True)) == []
        assert not list(store.paths.blobs.iterdir())
    with Store.open(root, backend=memory) as store:
        store.tasks.remove(["html"], last_copies=["html"])
        assert store.usage().unreferenced == len(b"weights of html")
        assert store.prune(grace=0).blobs == 1
        assert store.usage().codes == len(b"code of rust")
        weights = store.tasks.final("rust").weights
        memory.kept[weights] = b"weights of rusk"
        (finding,) = store.verify(read_data=True)
        assert (finding.kind, finding.path, finding.tasks) == ("digest", f"memory:{weights}", ("rust",))
        store.repair()
        assert list(memory.damaged.values()) == [b"weights of rusk"]


def test_what_was_written_after_a_time_is_not_deleted(blobs: Blobs) -> None:
    digest = blobs.put(b"bytes")
    assert blobs.delete([digest], newest=blobs.now() - 60) == 0
    assert blobs.delete([digest], newest=blobs.now() + 60) == len(b"bytes")


def test_quarantine_is_listed_and_emptied(blobs: Blobs) -> None:
    blobs.quarantine(blobs.put(b"bytes"))
    (aside,) = blobs.leftovers(aside=True)
    assert aside.size == len(b"bytes")
    assert list(blobs.leftovers()) == []
    aside.remove()
    aside.remove()
    assert list(blobs.leftovers(aside=True)) == []


def test_sizes_of_many_are_asked_for_at_once(blobs: Blobs) -> None:
    digests = blobs.put_all([b"1234", b"56"])
    assert blobs.sizes_of([*digests, *digests]) == dict(zip(digests, [4, 2], strict=True))
    with pytest.raises(MissingBlob, match=ABSENT):
        blobs.sizes_of([*digests, ABSENT])


def test_where_locks_may_be_lost_on_the_way_nothing_young_is_deleted_unless_somebody_says_how_young() -> None:
    remote = MemoryBackend()
    remote.is_remote = True
    blobs = Blobs(remote)
    digest = blobs.put(b"bytes")
    assert blobs.delete([digest]) == 0
    assert blobs.delete([digest], newest=blobs.now()) == len(b"bytes")
