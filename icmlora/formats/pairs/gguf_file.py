"""Read GGUF headers strictly and write GGUF files deterministically, without the `gguf` package.

    | "GGUF" | version 3 | tensors, keys (8 each) | keys and values | names, shapes, types, offsets | padding | data |

The package maps a file into memory and trusts its counts, so a file of 40 bytes can keep it busy for years. This reader
checks every count against the remaining bytes, and keeps keys and values as the original bytes.

Source: ggml-org/ggml, docs/gguf.md.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

from icmlora.errors import AdapterRefused, UnsafeInput
from icmlora.formats.format import Buffer
from icmlora.io.safetensors import (
    ITEM_BYTES,
    MAX_DIMENSION,
    MAX_HEADER_BYTES,
    MAX_TENSORS,
    TENSOR_NAME,
    RawTensor,
    TensorInfo,
)
from registry.names import escape

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)  # version 3 only adds big endian, which icm refuses
_HEAD = struct.Struct("<4sIQQ")
_MAX_KEYS = 4096
_MAX_DIMENSIONS = 4
_KEY = re.compile(r"[!-~]{1,256}")
_ALIGNMENT = 32
_ALIGNMENT_KEY = "general.alignment"

# Types of values with a fixed size, by number, and their `struct` codes.
_SCALARS: Mapping[int, str] = {
    **{0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f"},
    **{7: "?", 10: "Q", 11: "q", 12: "d"},
}
_UINT32, _FLOAT32, _TEXT, _ARRAY = 4, 6, 8, 9
# Safetensors names of tensor types by number. All other types are quantised.
_TYPES: Mapping[int, str] = {
    **{0: "F32", 1: "F16", 24: "I8", 25: "I16", 26: "I32"},
    **{27: "I64", 28: "F64", 30: "BF16"},
}
_NUMBERS = {name: number for number, name in _TYPES.items()}


@dataclass(frozen=True)
class GgufValue:
    """The type and bytes of a header value."""

    kind: int
    data: bytes

    @property
    def content(self) -> str | int | float | bool | None:
        """The text or number; None for a list, which is kept but not parsed."""
        if self.kind == _TEXT:
            return self.data[8:].decode("utf-8", "replace")
        return None if self.kind == _ARRAY else struct.unpack(f"<{_SCALARS[self.kind]}", self.data)[0]

    @classmethod
    def of(cls, content: str | int | float) -> GgufValue:
        """Build a value from a text, an integer (uint32) or a float (float32)."""
        if isinstance(content, str):
            data = content.encode()
            return cls(_TEXT, struct.pack("<Q", len(data)) + data)
        kind = _UINT32 if isinstance(content, int) else _FLOAT32
        return cls(kind, struct.pack(f"<{_SCALARS[kind]}", content))


@dataclass(frozen=True)
class GgufHeader:
    """A validated header: keys in file order, tensors in the order of their data.

    A tensor's shape has its innermost dimension last, as in numpy and torch; GGUF has the reverse order. Types of
    quantised tensors are named as in the `gguf` package.
    """

    values: Mapping[str, GgufValue]
    tensors: tuple[TensorInfo, ...] = field(default=())

    def text(self, key: str) -> str | None:
        """Return the text under a key, or None."""
        found = self.values.get(key)
        content = None if found is None else found.content
        return content if isinstance(content, str) and content else None


def read_gguf(data: Buffer, size: int | None = None) -> GgufHeader:
    """Read and check the header of a file in memory.

    Args:
        data: The file, or its start with the complete header.
        size: Size of the file in bytes, if `data` is only its start.

    Raises:
        AdapterRefused: It is damaged.
        UnsafeInput: It exceeds the limits, or has a duplicate or invalid name.
    """
    cursor = _Cursor(memoryview(data))
    magic, version, tensors, keys = cursor.unpack(_HEAD)
    if magic != _MAGIC:
        raise AdapterRefused("not a GGUF file", kind="damaged")
    if version not in _VERSIONS:
        raise AdapterRefused(f"unsupported GGUF version {version:#x}, or big-endian file", kind="damaged")
    values = _values(cursor, keys)
    if tensors > MAX_TENSORS:
        raise UnsafeInput(f"claims {tensors:,} tensors, more than {MAX_TENSORS:,}", kind="limits")
    found = [_tensor(cursor) for _ in range(tensors)]
    size = len(data) if size is None else size
    return GgufHeader(values, _placed(found, _aligned(cursor.at, _alignment(values)), size, _alignment(values)))


def parse_values(data: bytes) -> dict[str, GgufValue]:
    """Parse the output of `encode_values`; raises as `read_gguf` does."""
    cursor = _Cursor(memoryview(data))
    (count,) = cursor.unpack(struct.Struct("<Q"))
    return _values(cursor, count)


def encode_values(values: Mapping[str, GgufValue]) -> bytes:
    """Serialise the number of keys, then keys and values in order."""
    parts = [struct.pack("<Q", len(values))]
    for key, value in values.items():
        parts += [struct.pack("<Q", len(key)), key.encode("ascii"), struct.pack("<I", value.kind), value.data]
    return b"".join(parts)


def encode_gguf_file(values: Mapping[str, GgufValue], tensors: Mapping[str, RawTensor]) -> bytes:
    """Serialise a file deterministically.

    Raises:
        AdapterRefused: GGUF does not support the type of a tensor.
    """
    alignment, offset = _alignment(values), 0
    infos, data = [], []
    for name, tensor in tensors.items():
        dimensions = tensor.shape[::-1]
        infos.append(struct.pack("<Q", len(name)) + name.encode("ascii") + struct.pack("<I", len(dimensions)))
        kind = _NUMBERS.get(tensor.dtype)
        if kind is None:
            raise AdapterRefused(f"{name} has the type {tensor.dtype}, which GGUF does not support", kind="dtype")
        infos.append(struct.pack(f"<{len(dimensions)}QIQ", *dimensions, kind, offset))
        data.append(tensor.data + bytes(_aligned(len(tensor.data), alignment) - len(tensor.data)))
        offset += len(data[-1])
    keys = encode_values(values)
    head = _HEAD.pack(_MAGIC, _VERSIONS[-1], len(tensors), len(values)) + keys[8:] + b"".join(infos)
    return head + bytes(_aligned(len(head), alignment) - len(head)) + b"".join(data)


class _Cursor:
    """A read position in a header. Reads beyond the end of the file or the maximum header size are refused."""

    def __init__(self, view: memoryview) -> None:
        self._view, self.at = view, 0

    def take(self, size: int) -> bytes:
        end = self.at + size
        if end > len(self._view):
            hint = "download the file again; it seems truncated"
            raise AdapterRefused(f"its header ends after {len(self._view):,} bytes", kind="damaged", hint=hint)
        if end > MAX_HEADER_BYTES:
            raise UnsafeInput(f"has a header of more than {MAX_HEADER_BYTES:,} bytes", kind="limits")
        start, self.at = self.at, end
        return bytes(self._view[start:end])

    def unpack(self, form: struct.Struct) -> tuple[Any, ...]:
        return form.unpack(self.take(form.size))

    def number(self, code: str) -> int:
        (found,) = struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))
        return int(found)

    def name(self, pattern: re.Pattern[str], what: str) -> str:
        name = self.take(self.number("Q")).decode("latin-1")
        if not pattern.fullmatch(name):
            raise UnsafeInput(f"invalid {what} {escape(name, 120)!r}", kind="name")
        return name


def _values(cursor: _Cursor, count: int) -> dict[str, GgufValue]:
    if count > _MAX_KEYS:
        raise UnsafeInput(f"claims {count:,} keys, more than {_MAX_KEYS:,}", kind="limits")
    values: dict[str, GgufValue] = {}
    for _ in range(count):
        key, kind = cursor.name(_KEY, "key"), cursor.number("I")
        if key in values:
            raise UnsafeInput(f"the header has the key {key!r} twice", kind="duplicate-key")
        values[key] = GgufValue(kind, _value(cursor, kind, key))
    return values


def _value(cursor: _Cursor, kind: int, key: str) -> bytes:
    if kind in _SCALARS:
        return cursor.take(struct.calcsize(_SCALARS[kind]))
    if kind == _TEXT:
        size = cursor.number("Q")
        return struct.pack("<Q", size) + cursor.take(size)
    if kind == _ARRAY:
        item, count = cursor.number("I"), cursor.number("Q")
        head = struct.pack("<IQ", item, count)
        if item in _SCALARS:
            return head + cursor.take(count * struct.calcsize(_SCALARS[item]))
        if item == _TEXT:  # each takes at least eight bytes, so the header size bounds the loop
            return head + b"".join(_value(cursor, item, key) for _ in range(count))
    raise AdapterRefused(f"the key {key} has a value of an unknown type", kind="damaged")


def _alignment(values: Mapping[str, GgufValue]) -> int:
    found = values.get(_ALIGNMENT_KEY)
    if found is None:
        return _ALIGNMENT
    number = found.content
    if found.kind != _UINT32 or not isinstance(number, int) or number not in (8, 16, 32, 64, 128, 256):
        raise AdapterRefused(f"{_ALIGNMENT_KEY} is {number}, which icm does not support", kind="damaged")
    return number


def _aligned(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment


def _tensor(cursor: _Cursor) -> TensorInfo:
    """Read one tensor; its offsets count from the start of the data."""
    name = cursor.name(TENSOR_NAME, "tensor name")
    dimensions = cursor.number("I")
    if not 1 <= dimensions <= _MAX_DIMENSIONS:
        raise AdapterRefused(f"{name} has {dimensions} dimensions", kind="shape")
    shape = tuple(cursor.number("Q") for _ in range(dimensions))[::-1]
    if not all(1 <= size <= MAX_DIMENSION for size in shape):
        raise UnsafeInput(f"{name} has the invalid shape {escape(str(shape), 64)}", kind="limits")
    kind, begin = cursor.number("I"), cursor.number("Q")
    if kind in _TYPES:
        return TensorInfo(name, _TYPES[kind], shape, begin, begin + prod(shape) * ITEM_BYTES[_TYPES[kind]])
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType  # few adapters are quantised

    try:
        found = GGMLQuantizationType(kind)
    except ValueError:
        raise AdapterRefused(f"{name} has the unknown type {kind}", kind="dtype") from None
    items, size = GGML_QUANT_SIZES[found]
    if shape[-1] % items:
        raise AdapterRefused(
            f"{name} has rows of length {shape[-1]}, which {found.name} does not support", kind="shape"
        )
    return TensorInfo(name, found.name, shape, begin, begin + prod(shape) // items * size)


def _placed(found: list[TensorInfo], start: int, size: int, alignment: int) -> tuple[TensorInfo, ...]:
    """Return the tensors with offsets in the file; refuse overlaps, holes and trailing bytes."""
    if len({tensor.name for tensor in found}) < len(found):
        raise UnsafeInput("the header lists a tensor twice", kind="duplicate-key")
    placed: list[TensorInfo] = []
    end = start
    for tensor in sorted(found, key=lambda tensor: tensor.begin):
        begin = start + tensor.begin
        if begin != _aligned(end - start, alignment) + start:
            word = "overlaps the previous tensor" if begin < end else "does not start where the previous tensor ends"
            raise AdapterRefused(f"{tensor.name} {word}", kind="damaged")
        end = start + tensor.end
        placed.append(TensorInfo(tensor.name, tensor.dtype, tensor.shape, begin, end))
    if not end <= size <= start + _aligned(end - start, alignment):
        message = f"its tensors end at byte {end:,} but the file has {size:,}"
        raise AdapterRefused(message, kind="damaged", hint="download the file again")
    return tuple(placed)
