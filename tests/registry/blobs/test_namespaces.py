"""Blobs and manifests of a store are apart, in every kind of place."""

from __future__ import annotations

from pathlib import Path
from uuid import uuid4

import pytest

from registry.errors import DamagedBlob, MissingBlob
from registry.storage.blobs.backend import BlobBackend
from registry.storage.blobs.cache import BlobCache
from registry.storage.blobs.content import Blobs
from registry.storage.blobs.local import LocalBackend
from registry.storage.blobs.place import backends_at
from registry.storage.paths import StorePaths, make_folders

Places = tuple[BlobBackend, BlobBackend]


@pytest.fixture(params=["folder", "shared", "s3"])
def places(request: pytest.FixtureRequest, tmp_path: Path) -> Places:
    """Where a store has its blobs, and where its manifests."""
    if request.param == "folder":
        make_folders(StorePaths(tmp_path))
        return LocalBackend(StorePaths(tmp_path), "blobs"), LocalBackend(StorePaths(tmp_path), "manifests")
    if request.param == "s3":
        request.getfixturevalue("s3_environment")
    address = f"s3://icm/{uuid4().hex}" if request.param == "s3" else str(tmp_path / "shared")
    blobs, manifests = backends_at(address, "these tests")
    blobs.claim()  # for both
    return blobs, manifests


def test_equal_bytes_are_in_either_or_in_both(places: Places) -> None:
    blobs, manifests = Blobs(places[0]), Blobs(places[1], what="manifest")
    digest, other = blobs.put(b"{}"), manifests.put(b"another")
    assert not manifests.exists(digest)
    assert manifests.put(b"{}") == digest
    assert [info.digest for info in blobs.all()] == [digest]
    assert [info.digest for info in manifests.all()] == sorted([digest, other])
    assert Path(blobs.place(digest)).parts[-3:] == ("blobs", digest[0], digest)
    assert Path(manifests.place(digest)).parts[-3:] == ("manifests", digest[0], digest)


def test_what_is_deleted_or_moved_aside_in_one_stays_in_the_other(places: Places) -> None:
    blobs, manifests = map(Blobs, places)
    for files in (blobs, manifests):
        files.put_all([b"one", b"two"])
    one, two = (info.digest for info in sorted(blobs.all(), key=lambda info: blobs.read(info.digest)))
    assert places[0].delete(one) == 3
    manifests.quarantine(two)
    assert (manifests.read(one), blobs.read(two)) == (b"one", b"two")
    assert not blobs.exists(one)
    assert not manifests.exists(two)
    # There is one quarantine, which both show.
    assert [file.place for file in blobs.leftovers(aside=True)] == [
        file.place for file in manifests.leftovers(aside=True)
    ]


@pytest.mark.parametrize(("number", "what"), [(0, "blob"), (1, "manifest")])
def test_messages_say_what_is_missing_or_damaged(places: Places, number: int, what: str) -> None:
    files = Blobs(places[number], what=what)  # type: ignore[arg-type]
    digest = files.put(b"bytes")
    places[number].delete(digest)
    with pytest.raises(MissingBlob, match=f"^{what} {digest} is missing$"):
        files.read(digest)
    with places[number].batch() as batch:
        batch.put(digest, b"bytez")
    with pytest.raises(DamagedBlob, match=f"^{what} {digest} is damaged$") as error:
        files.read(digest)
    # A task whose manifest is lost cannot be ingested again: it is still known.
    assert ("ingest the original again" in str(error.value.hint)) == (what == "blob")


def test_one_folder_has_copies_of_both(places: Places, tmp_path: Path) -> None:
    if not places[0].is_remote:
        pytest.skip("local files are not copied")
    cache = BlobCache(tmp_path / "cache", 10_000)
    digests = []
    for place, data in zip(places, (b"blob", b"manifest"), strict=True):
        digest = Blobs(place, cache=cache).put(data)
        Blobs(place, cache=cache).fetch([digest])
        place.delete(digest)
        assert Blobs(place, cache=cache).read(digest) == data
        digests.append(digest)
    assert sorted(path.name for path in (tmp_path / "cache").glob("?/*")) == sorted(digests)
