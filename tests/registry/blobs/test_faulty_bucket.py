"""What networks and servers do to requests costs time or ends a command; no byte is wrong, lost, or deleted for it."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from registry.errors import StoreUnavailable
from registry.storage.blobs.content import Blobs
from registry.store import Store
from tests.registry.examples import ingest
from tests.s3_faults import Answer, Fault, FaultyServer, flipped, refuses, sleeps
from tests.s3_server import S3Server

pytestmark = pytest.mark.usefixtures("s3_environment")

SMALL, LARGE = b"bytes" * 100, random.Random(32).randbytes((9 << 20) + 1)
ALWAYS = float("inf")


@pytest.fixture
def server(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyServer]:
    """What the client takes for the server; it waits for a second where others wait for a minute."""
    from registry.storage.blobs import objects

    monkeypatch.setattr(objects, "_SILENCE", 1)
    monkeypatch.setattr(objects, "_DEADLINE", 1.5)
    with FaultyServer(s3.endpoint).running() as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.endpoint)
        yield server


@pytest.fixture
def blobs(server: FaultyServer) -> Blobs:
    """A place of its own, reached through the faulty server."""
    from registry.storage.blobs.objects import connect

    place = connect(f"s3://icm/{uuid4().hex}", "these tests")
    place.claim()
    return Blobs(place)


def lose(answer: Answer) -> None:
    answer.is_lost = True


def cut(answer: Answer) -> None:
    answer.cut = len(answer.body) // 2


def flip(answer: Answer) -> None:
    answer.body = flipped(answer.body)


def halve(answer: Answer) -> None:
    answer.body = answer.body[: len(answer.body) // 2]


@pytest.mark.parametrize(
    "fault",
    [
        Fault("PUT", 2, before=refuses(500)),
        Fault("PUT", 2, before=refuses(503)),
        Fault("PUT", 2, before=refuses(429)),
        Fault("PUT", 1, before=sleeps(1.5)),
        Fault("PUT", 1, after=lose),
        Fault("PUT", 1, before=flipped),
        Fault("PUT.*partNumber=2", 1, before=flipped),
        Fault("PUT.*partNumber=2", 1, after=lose),
        Fault("HEAD", 1, after=lose),
    ],
    ids=["500", "503", "429", "slow", "no answer", "flipped", "flipped part", "no answer to a part", "no status"],
)
@pytest.mark.parametrize("data", [SMALL, LARGE], ids=["small", "large"])
def test_what_is_acknowledged_is_there_whatever_happened_on_the_way(
    server: FaultyServer, blobs: Blobs, fault: Fault, data: bytes
) -> None:
    server.faults = [Fault(fault.of, fault.times, fault.before, fault.after)]
    digest = blobs.put(data)
    server.faults = []
    assert blobs.read(digest) == data


@pytest.mark.parametrize(
    "fault",
    [
        Fault("GET", 2, before=refuses(500)),
        Fault("GET", 2, before=refuses(503)),
        Fault("GET", 1, before=sleeps(1.5)),
        Fault("GET", 1, after=lose),
        Fault("GET", 3, after=cut),
        Fault("GET", 1, after=flip),
    ],
    ids=["500", "503", "slow", "no answer", "cut", "flipped"],
)
@pytest.mark.parametrize("data", [SMALL, LARGE], ids=["small", "large"])
def test_what_is_read_is_right_whatever_happened_on_the_way(
    server: FaultyServer, blobs: Blobs, fault: Fault, data: bytes
) -> None:
    digest = blobs.put(data)
    for read in (blobs.read, blobs.is_intact):
        server.faults = [Fault(fault.of, fault.times, fault.before, fault.after)]
        assert read(digest) in (data, True)
        assert server.faults[0].seen


@pytest.mark.one_case
@pytest.mark.parametrize("fault", [refuses(503), refuses(500), sleeps(1.5)], ids=["503", "500", "slow"])
def test_a_bucket_that_stays_away_ends_each_request_with_one_error(
    server: FaultyServer, blobs: Blobs, fault: Callable[[bytes], bytes | Answer]
) -> None:
    digest = blobs.put(SMALL)
    server.faults = [Fault("", ALWAYS, before=fault)]
    asked: list[Callable[[], object]] = [
        lambda: blobs.read(digest),
        lambda: blobs.put(b"more"),
        lambda: blobs.exists(digest),
        lambda: list(blobs.all()),
        lambda: blobs.delete([digest]),
    ]
    for ask in asked:
        with pytest.raises(StoreUnavailable, match="s3://"):
            ask()
    server.faults = []
    assert blobs.read(digest) == SMALL


@pytest.mark.parametrize("fault", [cut, halve], ids=["cut", "half"])
def test_a_listing_that_is_not_whole_is_an_error(
    server: FaultyServer, blobs: Blobs, fault: Callable[[Answer], None]
) -> None:
    digests = blobs.put_all([b"one", b"two"])
    server.faults = [Fault("GET.*list-type.*%2F" + digests[0][0], ALWAYS, after=fault)]
    with pytest.raises(StoreUnavailable):
        list(blobs.all())


def test_a_bucket_that_is_away_is_not_taken_for_damage(server: FaultyServer, tmp_path: Path) -> None:
    from registry.storage.blobs.objects import connect

    address = f"s3://icm/{uuid4().hex}"
    place = connect(address, "these tests")
    place.claim()
    backends = place, connect(address, "these tests", "manifests")
    with Store.open(tmp_path / "store", create=True, backends=backends) as store:
        ingest(store, "rust")
        before = list(place.all())
        server.faults = [Fault("HEAD|GET", ALWAYS, before=refuses(503))]
        with pytest.raises(StoreUnavailable):
            list(store.verify(read_data=True))
        with pytest.raises(StoreUnavailable):
            store.prune(grace=0)
        server.faults = []
        assert list(place.all()) == before
        assert not list(place.leftovers(aside=True))
        assert not list(store.verify(read_data=True))
