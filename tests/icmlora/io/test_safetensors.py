"""The strict safetensors reader and the deterministic writer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given, strategies as st

from icmlora.errors import AdapterRefused, UnsafeInput
from icmlora.formats.peft.peft import PEFT
from icmlora.formats.weights import read_weights
from icmlora.io.safetensors import MAX_TENSORS, RawTensor, encode, read_header
from icmlora.io.tensors import decode_torch
from tests.icmlora.adapter_files import entry, tensor_file, weights

FOUR = b"\0\0\0\0"
EIGHT = FOUR + FOUR

SHAPES = st.lists(st.integers(1, 4), max_size=3).map(tuple)
TENSORS = st.dictionaries(
    st.text(alphabet="ab.0", min_size=1, max_size=6),
    st.tuples(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]), SHAPES),
    min_size=1,
    max_size=5,
)


@given(TENSORS, st.dictionaries(st.text(max_size=4), st.text(max_size=4), max_size=2))
def test_what_the_library_writes_is_read_alike(
    tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]], metadata: dict[str, str]
) -> None:
    data = safetensors.torch.save(
        {name: torch.ones(shape, dtype=dtype) for name, (dtype, shape) in tensors.items()}, metadata
    )
    header = read_header(data)
    assert {info.name: info.shape for info in header.tensors} == {name: shape for name, (_, shape) in tensors.items()}
    assert header.metadata == metadata


@given(TENSORS)
def test_what_we_write_the_library_reads(tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
    names = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    raw = {}
    for name, (dtype, shape) in tensors.items():
        values = torch.ones(shape, dtype=dtype)
        raw[name] = RawTensor(names[dtype], shape, bytes(values.reshape(-1).view(torch.uint8).tolist()))
    loaded = safetensors.torch.load(encode(raw, {"format": "pt"}))
    assert {name: (value.dtype, tuple(value.shape)) for name, value in loaded.items()} == tensors
    assert all(bool((value == 1).all()) for value in loaded.values())


def test_the_same_tensors_in_another_order_give_the_same_bytes() -> None:
    a, b = RawTensor("F32", (1,), FOUR), RawTensor("BF16", (2,), FOUR)
    assert encode({"a": a, "b": b}, {"x": "1", "y": "2"}) == encode({"b": b, "a": a}, {"y": "2", "x": "1"})


def test_bytes_that_do_not_fill_the_shape_are_not_written() -> None:
    with pytest.raises(ValueError, match="do not fill"):
        encode({"a": RawTensor("F32", (2,), FOUR)}, {})


MALFORMED = {
    "empty file": (b"", "damaged"),
    "length only": (b"\x02\0\0\0\0\0\0\0", "damaged"),
    "header length of 2^63": ((2**63).to_bytes(8, "little") + b"{}", "limits"),
    "header of 100 GB": ((100 * 10**9).to_bytes(8, "little") + b"{}", "limits"),
    "header longer than the file": ((100).to_bytes(8, "little") + b"{}", "damaged"),
    "header that is no object": (tensor_file("[]"), "damaged"),
    "header that is no JSON": (tensor_file('{"a"'), "json"),
    "header that is no UTF-8": ((8).to_bytes(8, "little") + b'{"\xff": 1}', "json"),
    "metadata that is no text": (tensor_file({"__metadata__": {"a": 1}, "a": entry()}, FOUR), "damaged"),
    "metadata that is a list": (tensor_file({"__metadata__": [], "a": entry()}, FOUR), "damaged"),
    "duplicate tensor": (
        tensor_file(f'{{"a":{json.dumps(entry())},"a":{json.dumps(entry())}}}', FOUR),
        "duplicate-key",
    ),
    "tensor that is a number": (tensor_file({"a": 1}), "damaged"),
    "field missing": (tensor_file({"a": {"dtype": "F32", "shape": [1]}}, FOUR), "damaged"),
    "field too many": (tensor_file({"a": {**entry(), "x": 1}}, FOUR), "damaged"),
    "unknown type": (tensor_file({"a": entry(dtype="C64", end=8)}, EIGHT), "dtype"),
    "type that is a list": (tensor_file({"a": entry(dtype=[])}, FOUR), "dtype"),
    "shape that is text": (tensor_file({"a": entry(shape="1")}, FOUR), "damaged"),
    "shape of floats": (tensor_file({"a": entry(shape=[1.0])}, FOUR), "damaged"),
    "shape of truth values": (tensor_file({"a": entry(shape=[True])}, FOUR), "damaged"),
    "negative dimension": (tensor_file({"a": entry(shape=[-1])}, FOUR), "damaged"),
    "bytes for a dimension of 0": (tensor_file({"a": entry(shape=[0])}, FOUR), "damaged"),
    "dimension of 2^32": (tensor_file({"a": entry(shape=[2**32])}, FOUR), "limits"),
    "dimensions that overflow": (tensor_file({"a": entry(shape=[2**31] * 4)}, FOUR), "damaged"),
    "nine dimensions": (tensor_file({"a": entry(shape=[1] * 9)}, FOUR), "limits"),
    "three offsets": (tensor_file({"a": {**entry(), "data_offsets": [0, 4, 8]}}, FOUR), "damaged"),
    "offsets backwards": (tensor_file({"a": entry(begin=4, end=0)}, EIGHT), "damaged"),
    "offsets that do not fit the shape": (tensor_file({"a": entry(end=8)}, EIGHT), "damaged"),
    "offsets beyond the file": (tensor_file({"a": entry(begin=0, end=400, shape=[100])}, FOUR), "damaged"),
    "hole at the start": (tensor_file({"a": entry(4, 8)}, EIGHT), "damaged"),
    "hole between": (tensor_file({"a": entry(), "b": entry(8, 12)}, EIGHT + FOUR), "damaged"),
    "overlap": (tensor_file({"a": entry(0, 8, [2]), "b": entry(4, 8)}, EIGHT), "damaged"),
    "trailing bytes": (tensor_file({"a": entry()}, EIGHT), "damaged"),
    "cut": (weights()[:-1], "damaged"),
    "name that is a path": (tensor_file({"../../etc/passwd": entry()}, FOUR), "name"),
    "name with an escape": (tensor_file({"a\x1b[2J": entry()}, FOUR), "name"),
    "name of 600 characters": (tensor_file({"a" * 600: entry()}, FOUR), "name"),
    "empty name": (tensor_file({"": entry()}, FOUR), "name"),
    "too many tensors": (tensor_file("{" + '"a":{},' * (MAX_TENSORS + 3) + "}"), "limits"),
    "nesting bomb": (tensor_file('{"a":' + "[" * 100_000), "limits"),
    "zip, as torch.save writes": (b"PK\x03\x04" + b"\0" * 60, "pickle"),
    "pickle": (b"\x80\x02}q\x00.", "pickle"),
    "pickle of protocol 5": (b"\x80\x05\x95\x05\0\0\0\0\0\0\0}\x94.", "pickle"),
    "Git LFS pointer": (b"version https://git-lfs.github.com/spec/v1\n", "lfs"),
    "GGUF": (b"GGUF\x03\0\0\0" + b"\0" * 16, "gguf"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_file_is_refused_by_kind(case: str) -> None:
    data, kind = MALFORMED[case]
    with pytest.raises(AdapterRefused) as caught:
        read_header(data)
    assert caught.value.kind == kind


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_file_on_disk_is_refused_alike(case: str, tmp_path: Path) -> None:
    data, kind = MALFORMED[case]
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(data)
    with pytest.raises(AdapterRefused) as caught:
        read_weights(path, PEFT)
    assert (caught.value.kind, caught.value.path) == (kind, str(path))


UNUSUAL = {
    "no tensors": (tensor_file({}), {}),
    "metadata only": (tensor_file({"__metadata__": {"format": "pt"}}), {}),
    "integers": (tensor_file({"a": entry(dtype="I32")}, FOUR), {"a": ("I32", (1,))}),
    "bytes of 8 bits": (tensor_file({"a": entry(dtype="F8_E4M3", shape=[4])}, FOUR), {"a": ("F8_E4M3", (4,))}),
    "a single value": (tensor_file({"a": entry(shape=[])}, FOUR), {"a": ("F32", ())}),
    "eight dimensions": (tensor_file({"a": entry(shape=[1] * 8)}, FOUR), {"a": ("F32", (1,) * 8)}),
    "dimension of 0": (tensor_file({"a": entry(0, 0, shape=[0, 3])}), {"a": ("F32", (0, 3))}),
    "nothing after something": (
        tensor_file({"a": entry(), "b": entry(0, 0, shape=[0])}, FOUR),
        {"a": ("F32", (1,)), "b": ("F32", (0,))},
    ),
}


@pytest.mark.parametrize("case", UNUSUAL)
def test_what_the_format_allows_is_read_and_written_again(case: str) -> None:
    data, wanted = UNUSUAL[case]
    header = read_header(data)
    assert {tensor.name: (tensor.dtype, tensor.shape) for tensor in header.tensors} == wanted
    tensors = {info.name: RawTensor(info.dtype, info.shape, data[info.begin : info.end]) for info in header.tensors}
    again = read_header(encode(tensors, header.metadata))
    assert {tensor.name: (tensor.dtype, tensor.shape) for tensor in again.tensors} == wanted
    assert again.metadata == header.metadata


def test_metadata_in_other_letters_takes_no_more_bytes_than_it_has() -> None:
    data = encode({}, {"note": "Grüße, 日本"})
    assert "Grüße, 日本".encode() in data
    assert read_header(data).metadata == {"note": "Grüße, 日本"}


def test_a_type_without_arithmetic_is_not_decoded() -> None:
    with pytest.raises(AdapterRefused, match="I32") as caught:
        decode_torch(tensor_file({"a": entry(dtype="I32")}, FOUR))
    assert caught.value.kind == "dtype"


@pytest.mark.parametrize("length", [0x0280, 0x0380, 0x0480, 0x0580])
def test_a_header_whose_length_looks_like_a_pickle_is_read(length: int) -> None:
    text = json.dumps({"a": entry()})
    data = tensor_file(text + " " * (length - len(text)), FOUR)
    assert data[:1] == b"\x80"
    assert read_header(data).tensors[0].name == "a"


def test_a_pickle_is_unsafe_and_the_hint_says_what_to_do() -> None:
    with pytest.raises(UnsafeInput) as caught:
        read_header(b"PK\x03\x04rest of the file")
    assert caught.value.hint is not None
    assert "safetensors" in caught.value.hint


def test_a_scalar_is_read() -> None:
    assert read_header(tensor_file({"a": entry(shape=[])}, FOUR)).tensors[0].shape == ()


def test_a_sparse_terabyte_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "huge.safetensors"
    with path.open("wb") as stream:
        stream.truncate(2**40)
    with pytest.raises(UnsafeInput, match="is 1,099,511,627,776 bytes; the limit is"):
        read_weights(path, PEFT)


def test_a_sparse_file_under_the_limit_is_refused_by_its_header(tmp_path: Path) -> None:
    path = tmp_path / "sparse.safetensors"
    with path.open("wb") as stream:
        stream.write(weights())
        stream.truncate(7 * 2**30)
    with pytest.raises(AdapterRefused, match="tensors end at byte"):
        read_weights(path, PEFT)


@given(position=st.integers(0, 2000), value=st.integers(0, 255), cut=st.integers(0, 40))
def test_a_mutated_file_is_read_or_refused_and_never_read_where_the_library_refuses(
    position: int, value: int, cut: int
) -> None:
    data = bytearray(weights(dtype="bfloat16"))
    data[position % len(data)] = value
    data = data[: len(data) - cut]
    try:
        header = read_header(data)
    except AdapterRefused:
        return
    theirs = dict(safetensors.deserialize(bytes(data)))
    assert {info.name: list(info.shape) for info in header.tensors} == {n: t["shape"] for n, t in theirs.items()}


@given(st.binary(max_size=300))
def test_any_bytes_as_a_header_give_one_of_our_errors_or_a_file_the_library_reads(text: bytes) -> None:
    data = len(text).to_bytes(8, "little") + text
    try:
        read_header(data)
    except AdapterRefused:
        return
    safetensors.deserialize(data)
