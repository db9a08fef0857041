"""Damaged and hostile codes: refused with `CodeError`, also where the check at the end was made to fit."""

from __future__ import annotations

import contextlib
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

from icmlora.errors import CodeError
from icmlora.generator.codec.code import MAGIC, CodeHead, ParsedCode
from icmlora.generator.codec.encoding import encode_adapter
from icmlora.generator.codec.limits import Limits
from icmlora.generator.files.container import add_checksum
from tests.icmlora.peft_made import peft_codec, peft_fleet
from tests.icmlora.small_fleet import codec, make_adapter, make_vectors

CODEC = codec()
DATA = encode_adapter(CODEC, make_adapter(1, rank=4), make_vectors(1)).data
HEAD = len(MAGIC) + 36
WORDS = HEAD + int(struct.unpack_from("<I", DATA, HEAD - 4)[0])

KNOWN_CODEC = peft_codec()
KNOWN = encode_adapter(
    KNOWN_CODEC, peft_fleet().load(0, None), {}, peft_fleet().initial(0), limits=Limits(tolerance=0.3)
).data
PLAIN = zlib.decompress(KNOWN[HEAD : HEAD + int(struct.unpack_from("<I", KNOWN, HEAD - 4)[0])])
# Where the parts of its head begin, with the widths of three kinds, two layers and eight slots.
SHIFTS = 2 + 16 + 16 + 2 * 3 + 2 * 6
SEED = SHIFTS + 2 * 3 * 8  # shifts and boosts
RANKS = SEED + 4
OFFSETS = RANKS + 6
TASK_TYPE = OFFSETS + 8 * 6


@pytest.mark.parametrize("length", range(0, len(DATA), 3))
def test_a_code_cut_short_is_refused(length: int) -> None:
    with pytest.raises(CodeError):
        CODEC.decode(DATA[:length])


@given(extra=st.binary(min_size=1, max_size=12))
def test_a_code_with_bytes_after_its_end_is_refused(extra: bytes) -> None:
    with pytest.raises(CodeError):
        CODEC.decode(DATA + extra)


@given(place=st.integers(0, len(DATA) - 1), bit=st.integers(0, 7))
def test_a_changed_bit_anywhere_is_refused(place: int, bit: int) -> None:
    with pytest.raises(CodeError):
        CODEC.decode(flipped(place, bit))


@given(words=st.binary(max_size=200))
def test_any_words_under_a_valid_head_are_an_adapter_or_refused(words: bytes) -> None:
    try:
        decoded = CODEC.decode(checked(DATA[:WORDS] + words))
    except CodeError:
        return
    assert decoded.layout


@pytest.mark.parametrize("step", [-960, 960])
@pytest.mark.parametrize("gain", [-32768, 32767, 900])
def test_a_head_that_asks_for_values_beyond_float32_is_refused(step: int, gain: int) -> None:
    kept = np.full((3, 2), 4, dtype=np.uint16)
    try:
        decoded = CODEC.decode(hostile(kept, step, gain))
    except CodeError:
        return
    assert abs(gain) < 2**15 - 1
    assert all(torch.isfinite(factor).all() for module in decoded.modules for factor in (module.a, module.b))


def test_a_head_that_asks_for_everything_takes_no_more_than_its_generators_layout() -> None:
    data = hostile(np.full((3, 2), 4, dtype=np.uint16), 0, 0)
    numbers = sum(kind.inputs + kind.outputs for kind in CODEC.config.kinds) * 2 * 4
    tracemalloc.start()
    try:
        with contextlib.suppress(CodeError):
            CODEC.decode(data)
        assert tracemalloc.get_traced_memory()[1] < 100 * numbers + (1 << 20)
    finally:
        tracemalloc.stop()


def test_the_head_is_checked_even_where_its_checksum_is_right() -> None:
    plain = bytearray(zlib.decompress(DATA[HEAD:WORDS]))
    plain[2 + 16 + 16 + 2 * 3 + 6] = 9  # the first entry of `kept`: more slots than there are
    packed = zlib.compress(bytes(plain))
    with pytest.raises(CodeError, match="range"):
        CODEC.decode(checked(DATA[: HEAD - 4] + struct.pack("<I", len(packed)) + packed + DATA[WORDS:-8]))


def test_initial_as_are_checked_even_where_the_checksum_is_right() -> None:
    q = OFFSETS + 8 * 2  # the offset of q_proj in layer 0; down_proj comes before and is not there
    for place, value in ((RANKS, 9), (RANKS + 2, 255), (q + 3, 1), (q + 7, 255)):
        with pytest.raises(CodeError, match="initial A"):
            KNOWN_CODEC.decode(with_head(bytes([*PLAIN[:place], value, *PLAIN[place + 1 :]])))


@given(place=st.integers(SHIFTS, OFFSETS - 1), value=st.integers(0, 255), words=st.none() | st.binary(max_size=200))
def test_any_shifts_seed_and_ranks_are_an_adapter_or_refused(place: int, value: int, words: bytes | None) -> None:
    data = with_head(bytes([*PLAIN[:place], value, *PLAIN[place + 1 :]]), words)
    try:
        decoded = KNOWN_CODEC.decode(data)
    except CodeError:
        return
    assert decoded.layout


@pytest.mark.parametrize("value", [-128, 127])
def test_the_most_extreme_shifts_are_an_adapter_or_refused(value: int) -> None:
    data = with_head(PLAIN[:SHIFTS] + bytes([value & 255]) * (SEED - SHIFTS) + PLAIN[SEED:])
    with contextlib.suppress(CodeError):
        assert KNOWN_CODEC.decode(data).layout


@given(place=st.integers(0, len(KNOWN) - 1), bit=st.integers(0, 7))
def test_a_changed_bit_anywhere_in_a_code_with_an_initial_a_is_refused(place: int, bit: int) -> None:
    changed = bytearray(KNOWN)
    changed[place] ^= 1 << bit
    with pytest.raises(CodeError):
        KNOWN_CODEC.decode(bytes(changed))


@pytest.mark.parametrize("length", range(0, len(KNOWN), 7))
def test_a_code_with_an_initial_a_cut_short_is_refused(length: int) -> None:
    with pytest.raises(CodeError):
        KNOWN_CODEC.decode(KNOWN[:length])


def test_a_head_of_the_version_before_under_the_new_number_is_refused() -> None:
    with pytest.raises(CodeError):
        KNOWN_CODEC.decode(with_head(PLAIN[:SHIFTS] + PLAIN[TASK_TYPE:]))


def with_head(plain: bytes, words: bytes | None = None) -> bytes:
    """Return the code whose initial A is known, with another head (and other words), and the check made to fit."""
    packed = zlib.compress(plain)
    start = HEAD + int(struct.unpack_from("<I", KNOWN, HEAD - 4)[0])
    rest = KNOWN[start:-8] if words is None else words
    return add_checksum(KNOWN[: HEAD - 4] + struct.pack("<I", len(packed)) + packed + rest)


def checked(data: bytes) -> bytes:
    return add_checksum(data)


def flipped(place: int, bit: int) -> bytes:
    changed = bytearray(DATA)
    changed[place] ^= 1 << bit
    return bytes(changed)


def hostile(kept: np.ndarray[tuple[int, ...], np.dtype[np.uint16]], step: int, gain: int) -> bytes:
    sizes = CODEC.config.condition, CODEC.config.latent
    condition, latent = (np.full(size, -128, dtype=np.int8) for size in sizes)
    gains, strengths = np.full(3, gain, dtype=np.int16), np.full((3, 2), 127, dtype=np.int8)
    head = CodeHead(step, condition, latent, gains, strengths, kept, *[np.zeros((3, 4), dtype=np.int8)] * 2, None, None)
    return ParsedCode(CODEC.digest, head, b"\x5a" * 400).to_bytes(CODEC.config)
