"""The check at the end of our own files."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from icmlora.io.checksum import seal, unseal


@given(st.binary(max_size=64))
def test_what_was_sealed_comes_back(data: bytes) -> None:
    assert unseal(seal(data)) == data


@given(st.binary(max_size=64), st.integers(0, 10**6), st.integers(0, 7))
def test_a_changed_bit_anywhere_is_seen(data: bytes, place: int, bit: int) -> None:
    damaged = bytearray(seal(data))
    damaged[place % len(damaged)] ^= 1 << bit
    assert unseal(bytes(damaged)) is None


@given(st.binary(max_size=64), st.integers(0, 10**6))
def test_a_missing_end_is_seen(data: bytes, cut: int) -> None:
    sealed = seal(data)
    assert unseal(sealed[: cut % len(sealed)]) is None
