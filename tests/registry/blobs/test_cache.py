"""Copies of remote blobs: fewer requests, the same bytes, and no more space than is given."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from registry.errors import DamagedBlob, MissingBlob
from registry.storage.blobs.cache import BlobCache
from registry.storage.blobs.content import Blobs, digest_of
from tests.registry.blobs.in_memory import MemoryBackend
from tests.registry.children import run, run_together

LIMIT = 10_000


@pytest.fixture
def place() -> MemoryBackend:
    place = MemoryBackend()
    place.is_remote = True
    return place


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "blobs"


@pytest.fixture
def blobs(place: MemoryBackend, folder: Path) -> Blobs:
    return Blobs(place, cache=BlobCache(folder, LIMIT))


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("?/*"))


def taken(folder: Path) -> int:
    return sum(path.stat().st_size for path in files(folder))


def test_what_was_read_once_is_read_here(place: MemoryBackend, blobs: Blobs) -> None:
    digest = blobs.put(b"bytes")
    assert blobs.read(digest) == b"bytes"
    place.kept.clear()
    assert blobs.read(digest) == b"bytes"
    assert blobs.start(digest, 2) == b"by"


def test_what_was_fetched_ahead_is_read_here(place: MemoryBackend, blobs: Blobs) -> None:
    digests = blobs.put_all([b"one", b"two", b"three"])
    place.kept[digests[1]] = b"damaged"
    blobs.fetch(digests)
    place.kept.clear()
    assert [blobs.read(digest) for digest in digests[::2]] == [b"one", b"three"]
    with pytest.raises(MissingBlob):
        blobs.read(digests[1])


def test_writing_keeps_no_copy(blobs: Blobs, folder: Path) -> None:
    blobs.put(b"bytes")
    assert files(folder) == []


@pytest.mark.parametrize("wrong", [b"", b"byte", b"bytez"])
def test_a_damaged_copy_is_fetched_again(place: MemoryBackend, blobs: Blobs, folder: Path, wrong: bytes) -> None:
    digest = blobs.put(b"bytes")
    blobs.read(digest)
    (copy,) = files(folder)
    copy.write_bytes(wrong)
    assert blobs.read(digest) == b"bytes"
    assert copy.read_bytes() == b"bytes"
    copy.write_bytes(wrong)
    place.kept.clear()
    with pytest.raises(MissingBlob):
        blobs.read(digest)
    assert files(folder) == []


def test_what_is_damaged_where_it_is_kept_is_not_copied(place: MemoryBackend, blobs: Blobs, folder: Path) -> None:
    digest = blobs.put(b"bytes")
    place.kept[digest] = b"bytez"
    with pytest.raises(DamagedBlob):
        blobs.read(digest)
    assert files(folder) == []


def test_a_check_looks_at_the_place_and_not_at_the_copy(place: MemoryBackend, blobs: Blobs) -> None:
    digest = blobs.put(b"bytes")
    blobs.read(digest)
    place.kept[digest] = b"bytez"
    assert not blobs.is_intact(digest)
    with pytest.raises(DamagedBlob):
        blobs.check(digest)
    place.kept.clear()
    assert not blobs.exists(digest)
    for ask in (blobs.size, blobs.is_intact):
        with pytest.raises(MissingBlob):
            ask(digest)


def test_those_read_longest_ago_make_room(blobs: Blobs, folder: Path) -> None:
    digests = blobs.put_all([bytes([number]) * 2000 for number in range(6)])
    for age, digest in enumerate(digests[:4]):
        blobs.read(digest)
        os.utime(folder / digest[0] / digest, (1000 + age, 1000 + age))
    blobs.read(digests[0])
    for digest in digests[4:]:
        blobs.read(digest)
    assert {path.name for path in files(folder)} == {digests[0], digests[3], digests[4], digests[5]}


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 9), st.sampled_from([0, 1, 900, 3000, 9000, 9001, 20_000])), max_size=20))
def test_the_copies_never_take_more_than_they_may(blobs: Blobs, folder: Path, reads: list[tuple[int, int]]) -> None:
    for number, size in reads:
        data = bytes([number]) * size
        assert blobs.read(blobs.put(data)) == data
        assert taken(folder) <= LIMIT


def test_by_default_the_copies_take_half_of_what_is_free(tmp_path: Path) -> None:
    cache = BlobCache(tmp_path)
    assert 0 < cache.limit <= os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize


def test_copies_are_for_their_owner_alone(blobs: Blobs, folder: Path) -> None:
    blobs.read(blobs.put(b"bytes"))
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in files(folder))


def test_where_nothing_can_be_kept_everything_is_fetched(place: MemoryBackend, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    blobs = Blobs(place, cache=BlobCache(tmp_path / "file" / "blobs", LIMIT))
    assert blobs.read(blobs.put(b"bytes")) == b"bytes"


def test_what_a_killed_process_left_is_no_copy_and_goes(blobs: Blobs, folder: Path, place: MemoryBackend) -> None:
    blobs.read(blobs.put(b"bytes"))
    abandoned, begun = folder / "0" / "0.tmp", folder / "0" / "1.tmp"
    abandoned.write_bytes(b"old")
    begun.write_bytes(b"new")
    os.utime(abandoned, (1000, 1000))
    (folder / "lock").write_text("no number")
    blobs.read(blobs.put(b"more bytes"))
    assert not abandoned.exists()
    assert begun.exists()


@pytest.mark.parametrize("text", ["", "999999999999", "no number", "-5"])
def test_a_wrong_count_is_corrected(blobs: Blobs, folder: Path, text: str) -> None:
    blobs.read(blobs.put(b"bytes"))
    (folder / "lock").write_text(text)
    digest = blobs.put(b"more bytes")
    blobs.read(digest)
    assert (folder / digest[0] / digest).exists()
    assert (folder / "lock").read_text() == "15"


def test_many_processes_share_it_and_stay_within_the_limit(place: MemoryBackend, folder: Path) -> None:
    contents = [bytes([number]) * 1500 for number in range(20)]
    digests = Blobs(place).put_all(contents)

    def read_all(who: int) -> None:
        blobs = Blobs(place, cache=BlobCache(folder, LIMIT))
        for turn in range(60):
            number = (turn * (who + 1)) % 20
            assert blobs.read(digests[number]) == contents[number]

    assert run_together(*[lambda who=who: read_all(who) for who in range(6)]) == [0] * 6  # type: ignore[misc]
    assert taken(folder) <= LIMIT
    assert all(digest_of(path.read_bytes()) == path.name for path in files(folder))
    assert run(lambda: read_all(1)) == 0
