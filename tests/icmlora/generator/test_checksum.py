"""The checksum at the end of our own files."""

from __future__ import annotations

from hypothesis import given, strategies as st

from icmlora.generator.files.container import add_checksum, checked


@given(st.binary(max_size=64))
def test_content_comes_back_without_its_checksum(data: bytes) -> None:
    assert checked(add_checksum(data)) == data


@given(st.binary(max_size=64), st.integers(0, 10**6), st.integers(0, 7))
def test_a_changed_bit_anywhere_is_seen(data: bytes, place: int, bit: int) -> None:
    damaged = bytearray(add_checksum(data))
    damaged[place % len(damaged)] ^= 1 << bit
    assert checked(bytes(damaged)) is None


@given(st.binary(max_size=64), st.integers(0, 10**6))
def test_a_missing_end_is_seen(data: bytes, cut: int) -> None:
    data_with_checksum = add_checksum(data)
    assert checked(data_with_checksum[: cut % len(data_with_checksum)]) is None
