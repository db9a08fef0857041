"""Read safetensors strictly and write them deterministically. Imports neither numpy nor torch.

    | 8 bytes: N, little endian | N bytes: JSON header, space padded | data, no holes |

The header maps each name to {"dtype", "shape", "data_offsets"}. The public library accepts duplicate keys (the last
wins), names with escape characters, empty tensors and non-finite values; this reader refuses them.

Source: huggingface/safetensors, README ("Format").
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache, wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar, cast

from icmlora.errors import AdapterRefused, UnsafeInput, located
from icmlora.io.files import open_regular, read_exactly
from icmlora.io.strict_json import parse_object
from registry.names import escape

MAX_HEADER_BYTES = 8 * 1024 * 1024
MAX_TENSORS = 20_000
MAX_RANK = 8
MAX_DIMENSION = 2**31
# Above any adapter in use: rank 256 on every linear layer of a 70B model is 3.3 GB in bf16.
MAX_FILE_BYTES = 8 * 1024**3

ITEM_BYTES: Mapping[str, int] = {
    **{"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1},
    **{"I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1},
}

FLOAT_TYPES = frozenset({"F64", "F32", "F16", "BF16"})
"""Types of factors that can have a code."""

TENSOR_NAME = re.compile(r"[A-Za-z0-9_.-]{1,512}")
_PREFIX_BYTES = 8
_REMEMBERED_BYTES = 256 * 1024
_METADATA = "__metadata__"
_FIELDS = {"dtype", "shape", "data_offsets"}
_P = ParamSpec("_P")
_T = TypeVar("_T")


@dataclass(frozen=True)
class TensorInfo:
    """The location of one tensor; offsets count from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class RawTensor:
    """A tensor as row-major, little-endian bytes."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


@dataclass(frozen=True)
class TensorHeader:
    """A validated header or part of it: tensors in file order."""

    tensors: tuple[TensorInfo, ...]
    metadata: Mapping[str, str]

    @cached_property
    def runs(self) -> tuple[tuple[TensorInfo, ...], ...]:
        """Adjacent tensors of one type: a pass over a run is ten times faster than a pass per tensor."""
        runs: list[list[TensorInfo]] = []
        for tensor in self.tensors:
            if runs and (runs[-1][-1].dtype, runs[-1][-1].end) == (tensor.dtype, tensor.begin):
                runs[-1].append(tensor)
            else:
                runs.append([tensor])
        return tuple(map(tuple, runs))


def read_header(data: bytes | bytearray | memoryview) -> TensorHeader:
    """Read and check the header of a safetensors file in memory."""
    return parse_header(header_text(data), len(data))


def header_text(data: bytes | bytearray | memoryview) -> bytes:
    """Cut the JSON header out of a file in memory; raises as `read_header` does."""
    view = memoryview(data)
    length = _header_length(bytes(view[: _PREFIX_BYTES + 1]), len(view))
    return bytes(view[_PREFIX_BYTES : _PREFIX_BYTES + length])


def remembered(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """Cache the last few results for short byte arguments.

    A header is parsed several times: before its file is read, when the file is checked, and when it is compared. In a
    fleet, most adapters share their header byte for byte, and many share their configuration.
    """
    kept = cast("Callable[_P, _T]", lru_cache(maxsize=16)(function))

    @wraps(function)
    def result(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        size = sum(len(one) for one in args if isinstance(one, bytes))
        return kept(*args, **kwargs) if size <= _REMEMBERED_BYTES else function(*args, **kwargs)

    return result


@remembered
def parse_header(text: bytes, size: int) -> TensorHeader:
    """Parse and check a header against the size of its file; raises as `read_header` does."""
    # Each tensor opens one brace, so counting braces bounds the memory for parsing.
    if text.count(b"{") > MAX_TENSORS + 2:
        raise UnsafeInput(f"more than {MAX_TENSORS:,} tensors", kind="limits")
    fields = parse_object(text, what="the safetensors header", max_bytes=MAX_HEADER_BYTES)
    metadata = _metadata(fields.pop(_METADATA, {}))
    start = _PREFIX_BYTES + len(text)
    tensors = sorted(
        (_tensor(name, value, start) for name, value in fields.items()), key=lambda tensor: (tensor.begin, tensor.end)
    )
    _check_contiguous(tensors, start, size)
    return TensorHeader(tuple(tensors), metadata)


@dataclass(frozen=True)
class PeekedHeader:
    """The tensor names and metadata of a header, unchecked."""

    names: frozenset[str]
    metadata: Mapping[str, str]


def peek_header(path: Path) -> PeekedHeader | None:
    """Read the header of a file on disk, which may be truncated; None if there is no header."""
    try:
        with open_regular(path, max_bytes=2**62) as (descriptor, size):
            return peek_bytes(lambda count: read_exactly(descriptor, min(size, count), 0))
    except AdapterRefused:
        return None


def peek_bytes(start: Callable[[int], bytes]) -> PeekedHeader | None:
    """Read a header like `peek_header`, through a function that returns the first N bytes of the file."""
    length = int.from_bytes(start(_PREFIX_BYTES), "little")
    if not 0 < length <= MAX_HEADER_BYTES:
        return None
    try:
        fields = json.loads(start(_PREFIX_BYTES + length)[_PREFIX_BYTES:])
    except (ValueError, RecursionError):
        return None
    if not isinstance(fields, dict):
        return None
    metadata = fields.pop(_METADATA, None)
    texts = metadata.items() if isinstance(metadata, dict) else ()
    return PeekedHeader(frozenset(fields), {key: text for key, text in texts if isinstance(text, str)})


def read_tensor_header(path: Path, *, max_bytes: int = MAX_FILE_BYTES) -> TensorHeader:
    """Read and check the header of a safetensors file on disk, without its tensors."""
    with located(path), open_regular(path, max_bytes=max_bytes) as (descriptor, size):
        return read_head(descriptor, size)


def read_tensor(path: Path, info: TensorInfo, *, max_bytes: int = MAX_FILE_BYTES) -> RawTensor:
    """Read one tensor of a file on disk, at the offsets from its header."""
    with located(path), open_regular(path, max_bytes=max_bytes) as (descriptor, _):
        return RawTensor(info.dtype, info.shape, read_exactly(descriptor, info.end - info.begin, info.begin))


def read_head(descriptor: int, size: int) -> TensorHeader:
    """Read and check only the header of an open file; raises as `read_header` does."""
    start = read_exactly(descriptor, min(size, _PREFIX_BYTES + 1), 0)
    return parse_header(read_exactly(descriptor, _header_length(start, size), _PREFIX_BYTES), size)


def raw_tensors(data: bytes, tensors: Iterable[TensorInfo]) -> dict[str, RawTensor]:
    """Return some tensors of a file in memory, by name."""
    return {info.name: RawTensor(info.dtype, info.shape, data[info.begin : info.end]) for info in tensors}


def encode(tensors: Mapping[str, RawTensor], metadata: Mapping[str, str]) -> bytes:
    """Serialise tensors; the same tensors and metadata always give the same bytes.

    Raises:
        ValueError: The bytes of a tensor do not fill its shape.
    """
    # Metadata is sorted: the library's order varies from run to run.
    header: dict[str, Any] = {_METADATA: dict(sorted(metadata.items()))} if metadata else {}
    offset = 0
    # Wide types come first to keep every tensor aligned, as the format requires.
    order = sorted(tensors, key=lambda name: (-ITEM_BYTES[tensors[name].dtype], name))
    for name in order:
        tensor = tensors[name]
        if len(tensor.data) != math.prod(tensor.shape) * ITEM_BYTES[tensor.dtype]:
            raise ValueError(f"{name}: {len(tensor.data)} bytes do not fill {tensor.dtype} {tensor.shape}")
        end = offset + len(tensor.data)
        header[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([len(text).to_bytes(8, "little"), text, *(tensors[name].data for name in order)])


def _header_length(start: bytes, size: int) -> int:
    length = int.from_bytes(start[:_PREFIX_BYTES], "little")
    if size > _PREFIX_BYTES and start[_PREFIX_BYTES:] == b"{" and length <= min(MAX_HEADER_BYTES, size - _PREFIX_BYTES):
        return length
    # Not earlier: the length of a valid header may begin with the same two bytes as a pickle (640 is 80 02).
    _refuse_other_format(start)
    if size <= _PREFIX_BYTES:
        raise AdapterRefused(f"has {size} bytes, too few for a safetensors file", kind="damaged")
    if start[_PREFIX_BYTES:] != b"{":
        fact = "is not a safetensors file: its header does not start with '{'"
        raise AdapterRefused(fact, kind="damaged", hint="download the file again if it should be one")
    if length > MAX_HEADER_BYTES:
        message = f"claims a header of {length:,} bytes, more than {MAX_HEADER_BYTES:,}"
        raise UnsafeInput(message, kind="limits")
    message = f"claims a header of {length:,} bytes but has {size:,} in all"
    raise AdapterRefused(message, kind="damaged", hint="download the file again; it seems truncated")


def _refuse_other_format(start: bytes) -> None:
    if start.startswith(b"PK\x03\x04") or (start[:1] == b"\x80" and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")):
        raise UnsafeInput(
            "a pickle (a PyTorch file) can run code, so it was not opened",
            kind="pickle",
            hint="save the adapter as safetensors where it was trained",
        )
    if start[:6].lower() in (b"<!doct", b"<html>", b"<?xml "):
        hint = "download it again; the site may require a login"
        raise AdapterRefused("a web page, not the file itself", kind="damaged", hint=hint)
    if start.startswith(b"version "):
        raise AdapterRefused("a Git LFS pointer, not the file itself", kind="lfs", hint="run 'git lfs pull'")
    if start.startswith(b"GGUF"):
        raise AdapterRefused("a GGUF file, not safetensors", kind="gguf", hint="rename it to NAME.gguf")


def _check_contiguous(tensors: list[TensorInfo], start: int, size: int) -> None:
    expected = start
    for tensor in tensors:
        if tensor.begin != expected:
            word = "overlaps the previous tensor" if tensor.begin < expected else "leaves a gap before it"
            raise AdapterRefused(f"{tensor.name} {word}", kind="damaged")
        expected = tensor.end
    if expected != size:
        message = f"its tensors end at byte {expected:,} but the file has {size:,}"
        raise AdapterRefused(message, kind="damaged", hint="fetch the file again")


def _metadata(value: object) -> Mapping[str, str]:
    if value is None:  # MLX writes null, and the library accepts it
        return {}
    if isinstance(value, dict) and all(isinstance(item, str) for item in value.values()):
        return value
    raise AdapterRefused("the header's metadata is not a map of text to text", kind="damaged")


def _tensor(name: str, value: object, start: int) -> TensorInfo:
    if not TENSOR_NAME.fullmatch(name):
        raise UnsafeInput(f"invalid tensor name {escape(name, 120)!r}", kind="name")
    if not isinstance(value, dict) or set(value) != _FIELDS:
        raise AdapterRefused(f"{name} needs exactly dtype, shape and data_offsets", kind="damaged")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise AdapterRefused(f"{name} has the unknown type {escape(str(dtype), 32)}", kind="dtype")
    if not _is_sizes(shape) or not _is_sizes(offsets) or len(offsets) != 2:
        raise AdapterRefused(f"{name} has a shape or offsets that are not whole numbers", kind="damaged")
    if len(shape) > MAX_RANK or any(size > MAX_DIMENSION for size in shape):
        raise UnsafeInput(f"{name} has the invalid shape {escape(str(shape), 64)}", kind="limits")
    if offsets[1] - offsets[0] != math.prod(shape) * ITEM_BYTES[dtype]:
        raise AdapterRefused(f"{name} has offsets that do not fit {dtype} {shape}", kind="damaged")
    return TensorInfo(name, dtype, tuple(shape), start + offsets[0], start + offsets[1])


def _is_sizes(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**62 for item in value)
