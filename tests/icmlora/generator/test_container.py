"""The container that codes, networks and few-shot starts share."""

from __future__ import annotations

import zlib

import pytest
from hypothesis import given, strategies as st

from icmlora.errors import CodeError
from icmlora.generator.files.container import inflate, open_container, split_fields, write_container

PREFIX = b"ICMX\x01"
DATA = write_container(PREFIX, b"the head", b"the body")


@given(head=st.binary(max_size=200), body=st.binary(max_size=200))
def test_head_and_body_come_back(head: bytes, body: bytes) -> None:
    opened = open_container(write_container(PREFIX, head, body), len(PREFIX))
    assert opened is not None
    assert (inflate(opened[0], len(head), len(head)), opened[1]) == (head, body)


def test_equal_parts_give_equal_bytes() -> None:
    assert write_container(PREFIX, b"the head", b"the body") == DATA


@pytest.mark.parametrize("place", range(len(DATA)))
def test_a_changed_byte_anywhere_is_noticed(place: int) -> None:
    damaged = bytearray(DATA)
    damaged[place] ^= 1
    assert open_container(bytes(damaged), len(PREFIX)) is None


@pytest.mark.parametrize("length", range(len(DATA)))
def test_a_container_cut_short_is_noticed(length: int) -> None:
    assert open_container(DATA[:length], len(PREFIX)) is None


@pytest.mark.parametrize(
    "packed",
    [zlib.compress(b"12345"), zlib.compress(b"1"), zlib.compress(b"123") + b"x", zlib.compress(b"123")[:-1], b"123"],
    ids=["too long", "too short", "bytes after the end", "truncated", "not zlib"],
)
def test_a_head_that_is_not_one_stream_of_the_right_size_is_refused(packed: bytes) -> None:
    assert inflate(zlib.compress(b"123"), 2, 4) == b"123"
    with pytest.raises(CodeError):
        inflate(packed, 2, 4)


def test_fields_are_taken_in_order() -> None:
    first, empty, second = split_fields(b"\x01\x02\x03", [1, 0, 2])
    assert (first.tolist(), empty.tolist(), second.tolist()) == ([1], [], [2, 3])
