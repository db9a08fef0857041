"""Find NaN and infinity in the raw bits of a tensor file; numpy only, so that ingest never imports torch."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from icmlora.errors import AdapterRefused
from icmlora.io.safetensors import ITEM_BYTES, TensorHeader, TensorInfo

Bits = npt.NDArray[np.uint16] | npt.NDArray[np.uint32] | npt.NDArray[np.uint64]

# Exponent bits: a value with all of them set is NaN or infinite.
_EXPONENT = {"F64": 0x7FF << 52, "F32": 0x7F800000, "F16": 0x7C00, "BF16": 0x7F80}
_MANTISSA = {"F64": (1 << 52) - 1, "F32": 0x007FFFFF, "F16": 0x03FF, "BF16": 0x007F}
_UNSIGNED = {8: "<u8", 4: "<u4", 2: "<u2", 1: "u1"}
# Elements per chunk: 0.5 to 1 MB, which stays in the processor's cache for the second pass.
_CHUNK = 256 * 1024


def check_finite(data: bytes | bytearray | memoryview, header: TensorHeader) -> None:
    """Check that every value of a file is finite."""
    for run in header.runs:
        dtype = run[0].dtype
        if dtype in _EXPONENT and not _all_finite(bits(data, dtype, run[0].begin, run[-1].end), _EXPONENT[dtype]):
            _refuse_first(data, header)


def is_zero(data: bytes | bytearray | memoryview, tensor: TensorInfo) -> bool:
    """Return whether every value of a tensor is zero, of either sign."""
    values = bits(data, tensor.dtype, tensor.begin, tensor.end)
    # The shift drops the sign bit.
    return not any((values[start : start + _CHUNK] << 1).any() for start in range(0, values.size, _CHUNK))


def bits(data: bytes | bytearray | memoryview, dtype: str, begin: int, end: int) -> Bits:
    """View the bytes from `begin` to `end` as unsigned integers of the type's width, without a copy."""
    kind = np.dtype(_UNSIGNED[ITEM_BYTES[dtype]])
    return np.frombuffer(data, dtype=kind, count=(end - begin) // kind.itemsize, offset=begin)


def _all_finite(values: Bits, exponent: int) -> bool:
    # Values with all exponent bits set are the largest integers: positive values in a signed view, negative values in
    # an unsigned view. Two maxima need no memory; a mask would take as much as the values.
    negative = exponent | 1 << (8 * values.itemsize - 1)
    signed = values.view(f"<i{values.itemsize}")
    return all(
        int(signed[start : start + _CHUNK].max()) < exponent and int(values[start : start + _CHUNK].max()) < negative
        for start in range(0, values.size, _CHUNK)
    )


def _refuse_first(data: bytes | bytearray | memoryview, header: TensorHeader) -> None:
    for tensor in (tensor for tensor in header.tensors if tensor.dtype in _EXPONENT):
        values = bits(data, tensor.dtype, tensor.begin, tensor.end)
        wrong = np.flatnonzero((values & _EXPONENT[tensor.dtype]) == _EXPONENT[tensor.dtype])
        if wrong.size:
            index, shape = int(wrong[0]), tensor.shape
            value = int(values[index])
            name = "-Inf" if value >> (8 * ITEM_BYTES[tensor.dtype] - 1) else "Inf"
            name = "NaN" if value & _MANTISSA[tensor.dtype] else name
            position = [int(axis) for axis in np.unravel_index(index, shape)] if shape else []
            raise AdapterRefused(
                f"{tensor.name} holds {name} at {position} ({wrong.size:,} such values in the tensor)",
                kind="non-finite",
                hint="the training run diverged: use an earlier checkpoint",
            )
