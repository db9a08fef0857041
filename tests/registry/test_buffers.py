"""Memory that is lent, taken back and lent again."""

from __future__ import annotations

import ctypes
import mmap
import random
from concurrent.futures import ThreadPoolExecutor
from threading import Event, Lock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from registry.blobs.local import Buffers

PAGE = mmap.PAGESIZE


def address(memory: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


@settings(max_examples=50, deadline=None)
@given(sizes=st.lists(st.integers(0, 3 * PAGE), max_size=20))
def test_each_loan_has_the_size_that_was_asked_for_and_can_be_filled(sizes: list[int]) -> None:
    buffers = Buffers(2 * PAGE)
    for size in sizes:
        with buffers.lend(size) as memory:
            memory[:] = data = random.Random(size).randbytes(size)
            assert (len(memory), bytes(memory)) == (size, data)


@pytest.mark.parametrize("size", [1, PAGE - 1, PAGE, PAGE + 1])
def test_memory_begins_on_a_page(size: int) -> None:
    with Buffers(10 * PAGE).lend(size) as memory:
        assert address(memory) % PAGE == 0


def test_what_was_given_back_is_lent_again() -> None:
    buffers = Buffers(10 * PAGE)
    with buffers.lend(2 * PAGE) as memory:
        memory[:5] = b"bytes"
    with buffers.lend(PAGE) as memory:
        assert memory[:5] == b"bytes"


def test_two_loans_at_once_are_of_different_memory() -> None:
    buffers = Buffers(10 * PAGE)
    with buffers.lend(5) as first, buffers.lend(5) as second:
        first[:], second[:] = b"first", b"other"
        assert (first, second) == (b"first", b"other")


def test_a_loan_that_failed_is_given_back_too() -> None:
    buffers = Buffers(PAGE)
    with pytest.raises(LookupError), buffers.lend(PAGE):
        raise LookupError
    with buffers.lend(PAGE) as memory:
        assert len(memory) == PAGE


def test_memory_that_is_still_looked_at_when_all_is_over_stays_readable() -> None:
    buffers = Buffers(PAGE)
    with buffers.lend(5) as memory:
        memory[:] = b"bytes"
        kept = memory[1:3]
    del buffers, memory
    assert kept == b"yt"


def test_a_loan_waits_until_there_is_room_for_it() -> None:
    buffers, asked = Buffers(2 * PAGE), Event()

    def ask() -> int:
        asked.set()
        with buffers.lend(PAGE + 1) as memory:
            return len(memory)

    with ThreadPoolExecutor(1) as pool:
        with buffers.lend(PAGE):
            waiting = pool.submit(ask)
            assert asked.wait(10)
            with pytest.raises(TimeoutError):
                waiting.result(timeout=0.05)
        assert waiting.result(timeout=10) == PAGE + 1


def test_more_than_the_bound_is_lent_alone_and_not_kept() -> None:
    buffers = Buffers(PAGE)
    with buffers.lend(100 * PAGE) as memory:
        memory[:5] = b"large"
    with buffers.lend(PAGE) as memory:
        assert memory[:5] == bytes(5)


def test_many_threads_never_hold_more_than_the_bound() -> None:
    limit = 8 * PAGE
    buffers, lock, held, most = Buffers(limit), Lock(), [0], [0]

    def use(number: int) -> None:
        size = random.Random(number).randrange(4 * PAGE)
        with buffers.lend(size) as memory:
            with lock:
                held[0] += size
                most[0] = max(most[0], held[0])
            memory[:] = bytes([number % 256]) * size
            assert memory == bytes([number % 256]) * size
            with lock:
                held[0] -= size

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(use, range(500)))
    assert 0 < most[0] <= limit
