"""The reader of GGUF headers: what llama.cpp's own package writes is read, and anything else is refused in time."""

from __future__ import annotations

import struct
from contextlib import suppress
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from hypothesis import given, strategies as st

from icmlora.errors import AdapterRefused, UnsafeInput
from icmlora.formats.pairs.gguf_file import GgufValue, encode_gguf_file, encode_values, parse_values, read_gguf
from icmlora.io.safetensors import RawTensor
from tests.icmlora.formats.llama_files import gguf_file, random_tensors, text_value

HEAD = struct.Struct("<4sIQQ")
NAMES = st.from_regex(r"[a-z]{1,8}(\.[a-z0-9_]{1,8}){0,2}", fullmatch=True)
NUMBERS = st.floats(width=32, allow_nan=False).map(lambda number: GgufValue(6, struct.pack("<f", number)))
TEXTS = st.text(max_size=20).map(text_value)
LISTS = st.lists(st.integers(0, 2**32 - 1), max_size=5).map(
    lambda items: GgufValue(9, struct.pack(f"<IQ{len(items)}I", 4, len(items), *items))
)
VALUES = st.dictionaries(NAMES, NUMBERS | TEXTS | LISTS, max_size=6)
SHAPES = st.lists(st.integers(1, 4), min_size=1, max_size=4).map(tuple)


def opened(data: bytes, folder: Path) -> gguf.GGUFReader:
    path = folder / "a.gguf"
    path.unlink(missing_ok=True)  # a reader of another example may have it mapped
    path.write_bytes(data)
    return gguf.GGUFReader(path)


@given(values=VALUES, shapes=st.dictionaries(NAMES, SHAPES, max_size=4))
def test_what_is_written_is_read_by_the_gguf_package_and_by_us(
    values: dict[str, GgufValue], shapes: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    tensors = {name: RawTensor("F32", shape, torch.randn(shape).numpy().tobytes()) for name, shape in shapes.items()}
    data = encode_gguf_file(values, tensors)
    header = read_gguf(data)
    assert list(header.values.items()) == list(values.items())
    assert {one.name: (one.dtype, one.shape, data[one.begin : one.end]) for one in header.tensors} == {
        name: (one.dtype, one.shape, one.data) for name, one in tensors.items()
    }
    theirs = opened(data, tmp_path_factory.mktemp("gguf"))
    assert {one.name: one.data.tobytes() for one in theirs.tensors} == {name: one.data for name, one in tensors.items()}
    for key, value in values.items():
        if value.content is not None:
            assert theirs.fields[key].contents() == value.content


@given(values=VALUES)
def test_keys_and_values_survive_as_bytes(values: dict[str, GgufValue]) -> None:
    assert parse_values(encode_values(values)) == values


@given(data=st.data())
def test_no_damage_brings_anything_but_a_refusal(data: st.DataObject) -> None:
    whole = bytearray(gguf_file())
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, 600))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(whole)))
    for damaged in (bytes(whole), bytes(whole[:cut])):
        with suppress(AdapterRefused):
            read_gguf(damaged)


@given(data=st.binary(max_size=200))
def test_any_bytes_after_the_magic_are_read_or_refused(data: bytes) -> None:
    with suppress(AdapterRefused):
        read_gguf(b"GGUF\x03\0\0\0" + data)


@pytest.mark.parametrize("kind", [gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.Q4_0])
def test_a_quantised_tensor_is_found_where_the_gguf_package_finds_it(
    kind: gguf.GGMLQuantizationType, tmp_path: Path
) -> None:
    data = gguf_file({"x.weight": torch.randn(3, 64), "y.weight": torch.randn(2, 32)}, kind=kind)
    ours = {one.name: (one.dtype, data[one.begin : one.end]) for one in read_gguf(data).tensors}
    assert ours == {one.name: (kind.name, one.data.tobytes()) for one in opened(data, tmp_path).tensors}


def test_a_shape_has_its_innermost_dimension_last() -> None:
    found = {one.name: one.shape for one in read_gguf(gguf_file(random_tensors(x=(2, 3, 5)))).tensors}
    assert (found["x"], found["blk.0.attn_q.weight.lora_a"]) == ((2, 3, 5), (2, 8))


@pytest.mark.parametrize(
    ("data", "fact"),
    [
        (b"", "its header ends after 0 bytes"),
        (b"GGML" + bytes(20), "not a GGUF file"),
        (HEAD.pack(b"GGUF", 1, 0, 0), "unsupported GGUF version 0x1"),
        (HEAD.pack(b"GGUF", 3 << 24, 0, 0), "or big-endian file"),
        (HEAD.pack(b"GGUF", 3, 0, 0), "its tensors end at byte 32 but the file has 24"),
        (HEAD.pack(b"GGUF", 3, 0, 1) + struct.pack("<Q1sI", 1, b"x", 99), "a value of an unknown type"),
        (HEAD.pack(b"GGUF", 3, 0, 1) + struct.pack("<Q1sIIQ", 1, b"x", 9, 9, 5), "a value of an unknown type"),
        (HEAD.pack(b"GGUF", 3, 1, 0) + struct.pack("<Q1sI", 1, b"x", 5), "x has 5 dimensions"),
        (HEAD.pack(b"GGUF", 3, 1, 0) + struct.pack("<Q1sIQIQ", 1, b"x", 1, 4, 77, 0), "x has the unknown type 77"),
        (HEAD.pack(b"GGUF", 3, 1, 0) + struct.pack("<Q1sIQIQ", 1, b"x", 1, 4, 0, 32), "x does not start where"),
        (HEAD.pack(b"GGUF", 3, 1, 0) + struct.pack("<Q1sIQIQ", 1, b"x", 1, 4, 8, 0), "rows of length 4, which Q8_0"),
    ],
)
def test_a_damaged_header_is_refused_with_the_fact(data: bytes, fact: str) -> None:
    with pytest.raises(AdapterRefused, match=fact):
        read_gguf(data)


@pytest.mark.parametrize(
    ("data", "fact"),
    [
        (HEAD.pack(b"GGUF", 3, 0, 2**60), "claims 1,152,921,504,606,846,976 keys"),
        (HEAD.pack(b"GGUF", 3, 2**40, 0), "claims 1,099,511,627,776 tensors"),
        (HEAD.pack(b"GGUF", 3, 0, 1) + struct.pack("<Q1sI", 1, b"\x1b", 4), "invalid key"),
        (HEAD.pack(b"GGUF", 3, 1, 0) + struct.pack("<Q4s", 4, b"../x"), "invalid tensor name"),
        (HEAD.pack(b"GGUF", 3, 1, 0) + struct.pack("<Q1sIQIQ", 1, b"x", 1, 2**40, 0, 0), "x has the invalid shape"),
        (HEAD.pack(b"GGUF", 3, 0, 2) + 2 * struct.pack("<Q1sIB", 1, b"x", 0, 1), "the key 'x' twice"),
        (HEAD.pack(b"GGUF", 3, 2, 0) + 2 * struct.pack("<Q1sIQIQ", 1, b"x", 1, 4, 0, 0), "a tensor twice"),
        (HEAD.pack(b"GGUF", 3, 0, 1) + struct.pack("<Q1sIQ", 1, b"x", 8, 9 << 20) + bytes(9 << 20), "more than"),
    ],
)
def test_what_is_beyond_the_limits_is_unsafe(data: bytes, fact: str) -> None:
    with pytest.raises(UnsafeInput, match=fact):
        read_gguf(data)


@pytest.mark.parametrize("items", [4, 8, 9])
def test_a_list_that_claims_to_be_endless_is_refused_at_once(items: int) -> None:
    data = HEAD.pack(b"GGUF", 3, 0, 1) + struct.pack("<Q1sIIQ", 1, b"x", 9, items, 2**62)
    with pytest.raises(AdapterRefused):
        read_gguf(data)


@pytest.mark.parametrize("alignment", [0, 3, 2**31])
def test_an_odd_alignment_is_refused(alignment: int) -> None:
    data = encode_gguf_file({}, {})
    values = encode_values({"general.alignment": GgufValue(4, struct.pack("<I", alignment))})
    with pytest.raises(AdapterRefused, match=f"general.alignment is {alignment}"):
        read_gguf(data[:8] + bytes(8) + values + bytes(32))


def test_bytes_after_the_last_tensor_are_refused() -> None:
    with pytest.raises(AdapterRefused, match="its tensors end at byte"):
        read_gguf(gguf_file() + b"more")
