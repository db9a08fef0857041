"""Blobs in an object store: the promises of every place on a real server, and specifics of object stores."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import pytest

from registry.errors import NotAStore, StoreUnavailable
from registry.storage.blobs.backend import BlobBackend
from registry.storage.blobs.content import Blobs, digest_of
from registry.testing.blobs import BlobPromises
from tests.registry.children import run
from tests.s3_server import S3Server

if TYPE_CHECKING:
    from registry.storage.blobs.objects import ObjectBackend

OWNER = "the store of these tests"
pytestmark = pytest.mark.usefixtures("s3_environment")


def new_place(url: str | None = None, *, owner: str = OWNER, claimed: bool = True) -> ObjectBackend:
    from registry.storage.blobs.objects import connect

    place = connect(f"s3://icm/{uuid4().hex}" if url is None else url, owner)
    if claimed:
        place.claim()
    return place


def url_of(place: BlobBackend) -> str:
    return place.place("ab" * 32).rpartition("/blobs/")[0]


def objects_of(place: BlobBackend) -> Any:
    """Open the objects of a place with the client, to change them behind its back."""
    from obstore.store import from_url

    return from_url(url_of(place), client_options={"allow_http": True})


class TestS3(BlobPromises):
    """Objects in a bucket."""

    def new_place(self, same_as: BlobBackend | None = None) -> BlobBackend:
        return new_place(None if same_as is None else url_of(same_as))

    def damage(self, place: BlobBackend, digest: str, data: bytes) -> None:
        import obstore

        obstore.put(objects_of(place), f"blobs/{digest[0]}/{digest}", data)


def test_objects_are_named_as_files_in_a_folder_are() -> None:
    place = new_place()
    digest = Blobs(place).put(b"bytes")
    assert place.place(digest) == f"{url_of(place)}/blobs/{digest[0]}/{digest}"


def test_a_place_belongs_to_one_store() -> None:
    place = new_place()
    new_place(url_of(place))
    other = new_place(url_of(place), owner="another store", claimed=False)
    for use in (other.claim, other.now, lambda: list(other.all()), lambda: other.put(digest_of(b""), b"")):
        with pytest.raises(NotAStore, match="another store"):
            use()


@pytest.mark.parametrize("bucket", ["icm", "no-such-bucket"])
def test_where_nothing_of_icm_is_no_blob_is_called_missing(bucket: str) -> None:
    place = new_place(f"s3://{bucket}/{uuid4().hex}", claimed=False)
    for ask in (place.get, place.size, place.exists):
        with pytest.raises(StoreUnavailable, match="no icm blobs"):
            ask("ab" * 32)


def test_a_bucket_that_is_gone_takes_no_bytes_and_lists_none() -> None:
    place = new_place("s3://no-such-bucket/prefix", claimed=False)
    for use in (lambda: list(place.all()), lambda: place.put(digest_of(b""), b""), place.now):
        with pytest.raises(StoreUnavailable, match="no icm blobs"):
            use()


def test_a_wrong_key_is_told_without_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    url = url_of(new_place())
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another-secret")
    with pytest.raises(StoreUnavailable, match="403") as caught:
        new_place(url, claimed=False).put(digest_of(b""), b"")
    told = f"{caught.value} {caught.value.hint}"
    assert "credentials" in told
    assert "another-secret" not in told
    assert "icm-tests" not in told


@pytest.mark.parametrize("url", ["s3://key:secret@bucket/prefix", "s3://bucket/?key=secret", "https://secret/bucket"])
def test_an_address_with_a_password_is_refused_without_being_repeated(url: str) -> None:
    with pytest.raises(NotAStore) as caught:
        new_place(url)
    assert "secret" not in f"{caught.value} {caught.value.hint}"


def test_the_key_of_a_profile_is_used(s3: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in s3.environment:
        monkeypatch.delenv(name)
    key, secret, region, endpoint = s3.environment.values()
    (tmp_path / "config").write_text(f"[profile team]\nregion = {region}\nendpoint_url = {endpoint}\n")
    (tmp_path / "keys").write_text(f"[team]\naws_access_key_id = {key}\naws_secret_access_key = {secret}\n")
    monkeypatch.setenv("AWS_PROFILE", "team")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "keys"))
    blobs = Blobs(new_place())
    assert blobs.read(blobs.put(b"bytes")) == b"bytes"


def test_bytes_that_are_there_are_written_again_once_they_are_no_longer_young() -> None:
    import obstore

    place = new_place()
    digest = digest_of(b"bytes")
    assert place.put(digest, b"bytes")
    client, name = objects_of(place), f"blobs/{digest[0]}/{digest}"
    first = obstore.head(client, name)["last_modified"]
    assert not place.put(digest, b"bytes")
    assert obstore.head(client, name)["last_modified"] == first
    place.grace = -60.0  # all is old
    assert not place.put(digest, b"bytes")
    assert obstore.head(client, name)["last_modified"] >= first


def test_a_copy_of_this_process_gets_an_error_and_does_not_wait_for_ever() -> None:
    place = new_place()
    digest = Blobs(place).put(b"bytes")

    def use() -> None:
        for other in (place, new_place(url_of(place), claimed=False)):
            with pytest.raises(StoreUnavailable, match="cannot be used in a forked process"):
                Blobs(other).read(digest)

    assert run(use) == 0
    assert Blobs(place).read(digest) == b"bytes"


def test_what_else_is_in_the_bucket_is_no_blob() -> None:
    import obstore

    place = new_place()
    digest = Blobs(place).put(b"bytes")
    for name in ("notes.txt", f"blobs/{digest[0]}/notes.txt", f"blobs/f/deeper/{digest}", f"other/{digest}"):
        obstore.put(objects_of(place), name, b"")
    assert [blob.digest for blob in place.all()] == [digest]
