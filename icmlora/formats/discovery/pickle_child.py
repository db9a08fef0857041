"""Read a pickle of tensors in a sandbox and write the tensors as safetensors, one after the other."""

from __future__ import annotations

import json
from typing import Any, BinaryIO

import torch

from icmlora.formats.discovery.pickled import BROKEN, NOT_TENSORS, TOO_LARGE
from icmlora.io.safetensors import ITEM_BYTES
from icmlora.io.sandbox import NO_MEMORY

_TYPES = {
    **{torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"},
    **{torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.bool: "BOOL"},
    **{torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8"},
    **{torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8"},
}


def work(order: dict[str, Any], source: BinaryIO, target: BinaryIO) -> int:
    """Convert one file; return the status."""
    try:
        torch.set_num_threads(1)
        tensors = _plain(torch.load(source, weights_only=True, map_location="cpu"))
        if tensors is None:
            return NOT_TENSORS
        if sum(map(_size, tensors.values())) > order["memory"]:  # views can be larger than their storage
            return TOO_LARGE
        _write(target, tensors, order["metadata"])
    except MemoryError:
        return NO_MEMORY
    except Exception as error:  # a file can make torch raise any error
        return NO_MEMORY if "alloc" in str(error)[:1000] else BROKEN
    return 0


def _plain(found: Any) -> dict[str, torch.Tensor] | None:
    """Return the tensors by name, or None if there are other objects."""
    if not isinstance(found, dict):
        return None
    for name, tensor in found.items():
        if type(name) is not str or type(tensor) not in (torch.Tensor, torch.nn.Parameter):
            return None
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.dtype not in _TYPES:
            return None
    return {name: tensor.detach().resolve_neg() for name, tensor in found.items()}


def _size(tensor: torch.Tensor) -> int:
    return tensor.numel() * ITEM_BYTES[_TYPES[tensor.dtype]]


def _write(target: BinaryIO, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write the tensors as `icmlora.io.safetensors.encode` does, without a second copy of all in memory."""
    header: dict[str, Any] = {"__metadata__": metadata}
    order = sorted(tensors, key=lambda name: (-ITEM_BYTES[_TYPES[tensors[name].dtype]], name))
    offset = 0
    for name in order:
        dtype, end = _TYPES[tensors[name].dtype], offset + _size(tensors[name])
        header[name] = {"dtype": dtype, "shape": list(tensors[name].shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    target.write(len(text).to_bytes(8, "little") + text)
    for name in order:
        data = tensors[name].contiguous().reshape(-1).view(torch.uint8)
        target.write(data.numpy().data)
