"""Extras come out as they went in, bit for bit, and damage never goes unnoticed."""

from __future__ import annotations

import struct
from contextlib import suppress
from typing import NoReturn

import pytest
import torch
import zstandard
from hypothesis import given, strategies as st

from icmlora.errors import DataError
from icmlora.formats.extras import pack, tensor_files, unpack, unpack_tensors
from icmlora.io.safetensors import ITEM_BYTES, RawTensor

WIDTHS = st.sampled_from([1, 2, 4, 8])
NAMES = st.from_regex(r"[A-Za-z0-9_.]{1,40}", fullmatch=True)


@st.composite
def tensors(draw: st.DrawFn) -> RawTensor:
    """Draw a tensor of any type, of up to three dimensions, some of them empty."""
    dtype = draw(st.sampled_from(sorted(ITEM_BYTES)))
    shape = tuple(draw(st.lists(st.integers(0, 4), max_size=3)))
    size = ITEM_BYTES[dtype]
    for length in shape:
        size *= length
    return RawTensor(dtype, shape, draw(st.binary(min_size=size, max_size=size)))


@given(data=st.binary(max_size=500), width=WIDTHS)
def test_bytes_of_any_length_come_back(data: bytes, width: int) -> None:
    assert unpack(pack(data, width)) == data


def no_base() -> NoReturn:
    raise AssertionError("packed tensors need no base model")


def packed(given_tensors: dict[str, RawTensor]) -> list[bytes]:
    return [pack(data, width) for data, width in tensor_files(given_tensors)]


@given(st.dictionaries(NAMES, tensors(), max_size=6))
def test_tensors_of_any_type_and_shape_come_back(given_tensors: dict[str, RawTensor]) -> None:
    assert unpack_tensors(packed(given_tensors), base=no_base) == given_tensors


@given(st.dictionaries(NAMES, tensors(), max_size=6))
def test_the_order_of_tensors_does_not_change_the_blobs(given_tensors: dict[str, RawTensor]) -> None:
    turned = dict(reversed(given_tensors.items()))
    assert sorted(packed(given_tensors)) == sorted(packed(turned))


def head(seed: int = 0, rows: int = 300) -> RawTensor:
    """Return a trained head in bfloat16: 300 rows are more than 64 KiB."""
    values = torch.randn(rows, 128, generator=torch.Generator().manual_seed(seed)).bfloat16()
    return RawTensor("BF16", (rows, 128), values.view(torch.int16).numpy().tobytes())


def test_a_large_tensor_has_a_blob_of_its_own_that_other_tasks_share() -> None:
    bias = RawTensor("F32", (2,), bytes(8))
    first = set(packed({"score.weight": head(), "score.bias": bias}))
    second = set(packed({"score.weight": head(), "score.bias": RawTensor("F32", (2,), bytes(range(8)))}))
    assert len(first) == len(second) == 2
    assert len(first & second) == 1


def test_small_tensors_of_one_width_share_a_blob() -> None:
    small = {f"bias.{number}": RawTensor("F32", (2,), bytes(8)) for number in range(50)}
    half = {f"half.{number}": RawTensor("F16", (2,), bytes(4)) for number in range(50)}
    assert len(packed(small | half)) == 2


def test_the_numbers_of_a_head_pack_better_in_planes() -> None:
    data = head().data
    assert len(pack(data, 2)) < 0.85 * len(data)
    assert len(pack(data, 2)) < len(pack(data, 1))


@given(st.data())
def test_any_flipped_bit_is_noticed(draw: st.DataObject) -> None:
    data = bytes(range(256)) * 4
    damaged = bytearray(pack(data, 4))
    damaged[draw.draw(st.integers(0, len(damaged) - 1))] ^= 1 << draw.draw(st.integers(0, 7))
    with suppress(DataError):
        # Only the width, which says how to order the bytes, is covered by nothing but the digest of the blob.
        assert sorted(unpack(bytes(damaged))) == sorted(data)


@given(st.integers(0, 10_000))
def test_packed_bytes_that_are_cut_are_refused(end: int) -> None:
    whole = pack(bytes(range(256)) * 8, 2)
    with pytest.raises(DataError):
        unpack(whole[: end % len(whole)])


@given(st.binary(max_size=100))
def test_any_other_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(DataError):
        unpack(b"ICMX\x01" + data)


@pytest.mark.parametrize("claimed", [0, 99, 101, 2**40])
def test_a_length_that_does_not_fit_is_refused(claimed: int) -> None:
    frame = pack(bytes(100))[14:]
    with pytest.raises(DataError):
        unpack(struct.pack("<5sBQ", b"ICMX\x01", 1, claimed) + frame)


def test_a_frame_that_unfolds_beyond_its_length_is_refused_before_it_takes_memory() -> None:
    bomb = zstandard.ZstdCompressor(write_content_size=False).compressobj()
    frame = bomb.compress(bytes(64 << 20)) + bomb.flush()
    with pytest.raises(DataError):
        unpack(struct.pack("<5sBQ", b"ICMX\x01", 1, 100) + frame)


def test_a_frame_that_states_a_huge_length_is_refused_before_it_takes_memory() -> None:
    huge = bytearray(zstandard.ZstdCompressor().compress(bytes(100_000)))
    stated = zstandard.frame_content_size(bytes(huge))
    at = huge.index(stated.to_bytes(4, "little"))
    huge[at : at + 4] = (2**32 - 1).to_bytes(4, "little")
    with pytest.raises(DataError):
        unpack(struct.pack("<5sBQ", b"ICMX\x01", 1, 100_000) + bytes(huge))
