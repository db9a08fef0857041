"""Convert between tensor files and torch tensors: exact widening on read, checked rounding on write."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from icmlora.errors import AdapterRefused, DataError
from icmlora.io.finite import bits
from icmlora.io.safetensors import RawTensor, TensorHeader, encode, read_header

DTYPE_NAMES: Mapping[str, str] = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}

_TORCH: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_CHUNK = 1 << 18  # values widened together, which stay in the processor's cache
# numpy has no bfloat16: bits are passed as integers of the same width.
_INTEGERS = {"F64": torch.int64, "F32": torch.int32, "F16": torch.int16, "BF16": torch.int16}


def decode_float32(data: bytes | bytearray | memoryview, header: TensorHeader) -> dict[str, torch.Tensor]:
    """Read the tensors of a header as float32, in their shapes; F16 and BF16 widen exactly.

    Adjacent tensors may share storage.

    Raises:
        AdapterRefused: A tensor is not of a float type.
    """
    tensors: dict[str, torch.Tensor] = {}
    for run in header.runs:
        if run[0].dtype not in _TORCH:
            raise AdapterRefused(f"{run[0].name} has the unsupported type {run[0].dtype}", kind="dtype")
        raw, offset = bits(data, run[0].dtype, run[0].begin, run[-1].end), 0
        values = torch.empty(raw.size, dtype=torch.float32)
        for part in torch.split(values, _CHUNK):
            # A copy: torch must see neither read-only memory nor a misaligned address.
            piece = torch.from_numpy(raw[offset : offset + len(part)].copy())
            part.copy_(piece.view(_TORCH[run[0].dtype]))
            offset += len(part)
        offset = 0
        # Adjacent tensors of one type were widened together; split them again.
        for info in run:
            count = (info.end - info.begin) * values.numel() // (run[-1].end - run[0].begin)
            tensors[info.name] = values[offset : offset + count].view(info.shape)
            offset += count
    return tensors


def decode_torch(data: bytes) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    """Check a tensor file and read it as float32."""
    header = read_header(data)
    return dict(header.metadata), decode_float32(data, header)


def encode_torch(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str], *, dtype: str) -> bytes:
    """Serialise tensors as one type, rounding to nearest even; deterministic."""
    name = dtype_name(dtype)
    return encode({key: raw_tensor(key, tensor, name) for key, tensor in tensors.items()}, metadata)


def dtype_name(dtype: str) -> str:
    """Return the safetensors name of a number format for adapters.

    Raises:
        DataError: Adapters cannot be written in it.
    """
    if dtype not in DTYPE_NAMES:
        raise DataError(f"unknown number format {dtype!r}", hint=f"choose one of {', '.join(sorted(DTYPE_NAMES))}")
    return DTYPE_NAMES[dtype]


def raw_tensor(key: str, tensor: torch.Tensor, dtype: str) -> RawTensor:
    """Round a tensor to a safetensors type; refuse values that overflow."""
    narrow = rounded(key, tensor.detach().cpu(), dtype).contiguous()
    return RawTensor(dtype, tuple(narrow.shape), narrow.view(_INTEGERS[dtype]).numpy().tobytes())


def rounded(key: str, tensor: torch.Tensor, dtype: str) -> torch.Tensor:
    """Return a tensor in a safetensors type, rounded to nearest even.

    Raises:
        AdapterRefused: A value overflows that type; `key` is the tensor's name.
    """
    narrow = tensor.to(_TORCH[dtype])
    if not is_finite(narrow):
        message = f"{key} contains a value that {dtype} cannot represent"
        raise AdapterRefused(message, kind="overflow", hint="write float32")
    return narrow


def is_finite(tensor: torch.Tensor) -> bool:
    """Return whether all values are finite."""
    # A finite sum proves that all values are finite, in one pass. The exact test runs if the sum overflowed.
    return math.isfinite(tensor.sum(dtype=torch.float64)) or bool(torch.isfinite(tensor).all())
