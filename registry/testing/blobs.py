"""What every place for blobs must do: promises one by one, in any order, and from several threads.

class TestMyPlace(BlobPromises):
    def new_place(self) -> BlobBackend:                 an empty place; and, given one, the same opened once more
    def damage(self, place, digest, data) -> None:      replace a blob's bytes without the backend's knowledge
"""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from registry.errors import DamagedBlob, MissingBlob
from registry.storage.blobs.backend import BlobBackend
from registry.storage.blobs.content import Blobs, digest_of

ABSENT = "ab" * 32
_WRONG = [b"", b"byte", b"bytes!", b"bytez"]
_THREADS, _ROUNDS = 8, 5
_TICK = 0.02  # seconds; clocks of file systems advance in steps of up to 10 ms
_STEPS = 25
# Each example begins with what others left, which is the point; and several places inherit one test.
_SHARED = settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.differing_executors])


class BlobPromises:
    """The promises of a place for blobs, as a class of tests for pytest."""

    def new_place(self, same_as: BlobBackend | None = None) -> BlobBackend:
        """Return an empty place, or another handle on one, as a further process would open it."""
        raise NotImplementedError

    def damage(self, place: BlobBackend, digest: str, data: bytes) -> None:
        """Replace a blob's bytes without the backend's knowledge."""
        raise NotImplementedError

    @pytest.fixture
    def place(self) -> BlobBackend:
        """An empty place."""
        return self.new_place()

    @pytest.fixture
    def blobs(self, place: BlobBackend) -> Blobs:
        """What a store makes of it."""
        return Blobs(place)

    def test_a_blob_is_named_by_the_sha256_of_its_bytes(self, blobs: Blobs) -> None:
        assert blobs.put(b"bytes") == hashlib.sha256(b"bytes").hexdigest()

    @_SHARED
    @given(items=st.lists(st.binary(max_size=200), max_size=8))
    def test_what_is_put_is_read_back_in_order(self, blobs: Blobs, items: list[bytes]) -> None:
        digests = blobs.put_all(items)
        assert [blobs.read(digest) for digest in digests] == items
        assert [blobs.size(digest) for digest in digests] == list(map(len, items))
        assert {blob.digest for blob in blobs.all()} >= set(map(digest_of, items))

    @pytest.mark.parametrize("size", [0, 1, (8 << 20) - 1, 8 << 20, (20 << 20) + 1])
    def test_a_blob_may_have_any_length(self, blobs: Blobs, size: int) -> None:
        data = random.Random(size).randbytes(size)  # noqa: S311
        digest = blobs.put(data)
        assert blobs.read(digest) == data
        assert blobs.size(digest) == size
        assert blobs.is_intact(digest)
        assert blobs.start(digest, 64) == data[:64]

    @pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
    def test_bytes_may_come_in_any_buffer(self, blobs: Blobs, kind: Callable[[bytes], bytes]) -> None:
        assert blobs.read(blobs.put(kind(b"bytes"))) == b"bytes"

    def test_a_batch_says_which_bytes_are_new(self, place: BlobBackend) -> None:
        with place.batch() as batch:
            assert batch.put(digest_of(b"one"), b"one")
            assert not batch.put(digest_of(b"one"), b"one")
        with place.batch() as batch:
            assert not batch.put(digest_of(b"one"), b"one")
            assert batch.put(digest_of(b"two"), b"two")

    def test_a_batch_that_fails_leaves_whole_blobs_at_most(self, place: BlobBackend, blobs: Blobs) -> None:
        def fail() -> None:
            with place.batch() as batch:
                batch.put(digest_of(b"bytes"), b"bytes")
                raise LookupError

        with pytest.raises(LookupError):
            fail()
        assert all(map(blobs.is_intact, [blob.digest for blob in place.all()]))
        assert place.is_remote or not list(place.all())
        assert not list(place.leftovers())

    def test_another_process_sees_what_one_has_written(self, place: BlobBackend, blobs: Blobs) -> None:
        other = Blobs(self.new_place(place))
        digest = blobs.put(b"bytes")
        assert other.read(digest) == b"bytes"
        assert other.delete([digest], newest=other.now()) == len(b"bytes")
        assert not blobs.exists(digest)

    def test_a_listing_has_names_sizes_and_times(self, blobs: Blobs) -> None:
        digests = blobs.put_all([b"1234", b"56"])
        listed = {blob.digest: blob for blob in blobs.all()}
        assert [listed[digest].size for digest in digests] == [4, 2]
        assert all(abs(blobs.now() - blob.modified) < 60 for blob in listed.values())

    def test_a_listing_of_many_is_complete_and_in_order(self, blobs: Blobs) -> None:
        digests = blobs.put_all([f"blob {number}".encode() for number in range(150)])
        assert [blob.digest for blob in blobs.all()] == sorted(digests)

    @pytest.mark.parametrize("wrong", _WRONG)
    def test_a_damaged_blob_is_not_read(self, blobs: Blobs, place: BlobBackend, wrong: bytes) -> None:
        digest = blobs.put(b"bytes")
        self.damage(place, digest, wrong)
        with pytest.raises(DamagedBlob) as caught:
            blobs.read(digest)
        assert caught.value.path == place.place(digest)
        assert not blobs.is_intact(digest)
        with pytest.raises(DamagedBlob):
            blobs.check(digest)

    @pytest.mark.parametrize("wrong", _WRONG)
    def test_putting_the_bytes_again_heals_a_damaged_blob(self, blobs: Blobs, place: BlobBackend, wrong: bytes) -> None:
        digest = blobs.put(b"bytes")
        self.damage(place, digest, wrong)
        blobs.put(b"bytes")
        assert blobs.read(digest) == b"bytes"

    @pytest.mark.one_case
    @_SHARED
    @given(bit=st.integers(0, 8 * 64 - 1))
    def test_every_flipped_bit_is_found(self, blobs: Blobs, place: BlobBackend, bit: int) -> None:
        data = bytearray(range(64))
        digest = blobs.put(data)
        data[bit // 8] ^= 1 << bit % 8
        self.damage(place, digest, bytes(data))
        with pytest.raises(DamagedBlob):
            blobs.read(digest)

    @pytest.mark.parametrize("ask", [Blobs.read, Blobs.size, Blobs.check, Blobs.is_intact])
    def test_a_missing_blob_is_named(self, blobs: Blobs, ask: Callable[[Blobs, str], object]) -> None:
        with pytest.raises(MissingBlob, match=ABSENT):
            ask(blobs, ABSENT)
        assert not blobs.exists(ABSENT)

    @pytest.mark.parametrize("name", ["../owner", "ab", ABSENT.upper(), f"{ABSENT[:-1]}/", ""])
    def test_what_is_no_digest_is_no_name(self, place: BlobBackend, name: str) -> None:
        for ask in (place.get, place.size, place.exists, place.delete):
            with pytest.raises(ValueError, match="not a digest"):
                ask(name)

    def test_deleting_says_what_it_freed(self, blobs: Blobs) -> None:
        digests = blobs.put_all([b"1234", b"56"])
        assert blobs.delete([*digests, ABSENT], newest=blobs.now()) == 6
        assert list(blobs.all()) == []

    def test_what_was_written_after_a_time_is_not_deleted(self, blobs: Blobs) -> None:
        digest = blobs.put(b"bytes")
        assert blobs.delete([digest], newest=blobs.now() - 60) == 0
        assert blobs.delete([digest], newest=blobs.now() + 60) == len(b"bytes")

    def test_where_locks_may_be_lost_on_the_way_nothing_young_is_deleted(
        self, blobs: Blobs, place: BlobBackend
    ) -> None:
        digest = blobs.put(b"bytes")
        assert blobs.delete([digest]) == (0 if place.is_remote else len(b"bytes"))

    def test_a_blob_in_quarantine_is_not_read_any_more(self, blobs: Blobs, place: BlobBackend) -> None:
        digest = blobs.put(b"bytes")
        assert digest in place.quarantine(digest)
        assert list(blobs.all()) == []
        with pytest.raises(MissingBlob):
            blobs.read(digest)

    def test_quarantine_is_listed_and_emptied(self, blobs: Blobs) -> None:
        blobs.quarantine(blobs.put(b"bytes"))
        (aside,) = blobs.leftovers(aside=True)
        assert aside.size == len(b"bytes")
        assert list(blobs.leftovers()) == []
        aside.remove()
        aside.remove()
        assert list(blobs.leftovers(aside=True)) == []

    def test_many_at_a_time_write_read_list_and_delete_without_an_error(self, place: BlobBackend) -> None:
        kept = [f"kept {number}".encode() for number in range(10)]

        def work(who: int) -> None:
            blobs = Blobs(self.new_place(place))
            for turn in range(_ROUNDS):
                own = f"{who} {turn}".encode()
                *shared, mine = blobs.put_all([*kept, own])
                assert [blobs.read(digest) for digest in shared] == kept
                assert {*shared, mine} <= blobs.sizes().keys()
                time.sleep(_TICK)  # file times have a coarse clock: a new file may be a tick ahead of `now`
                assert blobs.delete([mine], newest=blobs.now()) == len(own)

        with ThreadPoolExecutor(_THREADS) as pool:
            for done in [pool.submit(work, who) for who in range(_THREADS)]:
                done.result()
        assert [blob.digest for blob in place.all()] == sorted(map(digest_of, kept))

    def test_in_any_order_a_place_and_a_dictionary_agree(self) -> None:
        model = type("BlobModelOfOne", (BlobModel,), {"promises": self})
        run_state_machine_as_test(model, settings=settings(stateful_step_count=_STEPS))


class BlobModel(RuleBasedStateMachine):
    """A place and a dictionary, digest -> the bytes that are there, right or wrong."""

    promises: BlobPromises
    contents = st.sampled_from([b"", b"one", b"two", b"three" * 1000])

    def __init__(self) -> None:
        super().__init__()
        self.place = self.promises.new_place()
        self.blobs = Blobs(self.place)
        self.there: dict[str, bytes] = {}
        self.aside: list[bytes] = []

    @rule(items=st.lists(contents, max_size=3))
    def put(self, items: list[bytes]) -> None:
        self.blobs.put_all(items)
        self.there |= {digest_of(data): data for data in items}

    @rule(data=contents)
    def fail_in_a_batch(self, data: bytes) -> None:
        digest = digest_of(data)
        with suppress(LookupError), self.place.batch() as batch:
            batch.put(digest, data)
            raise LookupError
        if self.place.exists(digest) and self.blobs.is_intact(digest):  # it was, or the place takes nothing back
            self.there[digest] = data

    @precondition(lambda self: self.there)
    @rule(pick=st.randoms(use_true_random=False), wrong=st.binary(max_size=5))
    def damage(self, pick: random.Random, wrong: bytes) -> None:
        digest = pick.choice(sorted(self.there))
        self.promises.damage(self.place, digest, wrong)
        self.there[digest] = wrong

    @precondition(lambda self: self.there)
    @rule(pick=st.randoms(use_true_random=False), is_old=st.booleans())
    def delete(self, pick: random.Random, is_old: bool) -> None:
        digest = pick.choice(sorted(self.there))
        freed = self.blobs.delete([digest, ABSENT], newest=self.blobs.now() + (60 if is_old else -60))
        assert freed == (len(self.there.pop(digest)) if is_old else 0)

    @precondition(lambda self: self.there)
    @rule(pick=st.randoms(use_true_random=False))
    def move_aside(self, pick: random.Random) -> None:
        digest = pick.choice(sorted(self.there))
        assert digest in self.blobs.quarantine(digest)
        self.aside.append(self.there.pop(digest))

    @rule()
    def empty_the_quarantine(self) -> None:
        for file in list(self.blobs.leftovers(aside=True)):
            file.remove()
        self.aside.clear()

    @rule()
    def open_again(self) -> None:
        self.place = self.promises.new_place(self.place)
        self.blobs = Blobs(self.place)

    @invariant()
    def the_place_and_the_dictionary_agree(self) -> None:
        assert self.blobs.sizes() == {digest: len(data) for digest, data in self.there.items()}
        assert sorted(file.size for file in self.blobs.leftovers(aside=True)) == sorted(map(len, self.aside))
        assert not list(self.blobs.leftovers())
        for digest, data in self.there.items():
            assert self.blobs.is_intact(digest) == (digest_of(data) == digest)
            if self.blobs.is_intact(digest):
                assert self.blobs.read(digest) == data
