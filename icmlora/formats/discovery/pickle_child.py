"""Read pickles of tensors, each in its own process, and write the tensors as safetensors.

`pickled.py` runs this script and sends it two open files at a time: a pickle and the new file. The script imports torch
once, reads no pickle itself, and forks a process for each pickle, which first limits its resources. It imports nothing
of icm. The exit status of the fork is the result; its output is never shown, because a pickle could control it.
"""

from __future__ import annotations

import json
import math
import os
import socket
import sys
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

BROKEN, NOT_TENSORS, TOO_LARGE, NO_MEMORY = 10, 11, 12, 13

_MAX_ORDER_LENGTH = 1 << 16  # bytes

# Names and widths as in icmlora.io.safetensors.
_TYPES = {
    **{"float64": ("F64", 8), "float32": ("F32", 4), "float16": ("F16", 2), "bfloat16": ("BF16", 2)},
    **{"float8_e4m3fn": ("F8_E4M3", 1), "float8_e5m2": ("F8_E5M2", 1)},
    **{"int64": ("I64", 8), "int32": ("I32", 4), "int16": ("I16", 2), "int8": ("I8", 1)},
    **{"uint64": ("U64", 8), "uint32": ("U32", 4), "uint16": ("U16", 2), "uint8": ("U8", 1), "bool": ("BOOL", 1)},
}


def serve(channel: int, paths: str) -> None:
    """Convert the files received through a socket until its other end is closed."""
    # Started with -I, which drops package paths outside the interpreter's own folder.
    sys.path.extend(path for path in paths.split(os.pathsep) if path not in sys.path)
    import torch

    torch.set_num_threads(1)
    with socket.socket(fileno=channel) as line:
        while True:
            order, files, _, _ = socket.recv_fds(line, _MAX_ORDER_LENGTH, 2)
            if not order:
                return
            forked = os.fork()
            if forked == 0:
                line.close()
                _convert_and_exit(json.loads(order), files, torch)
            for file in files:
                os.close(file)
            line.send(b"%d" % os.waitstatus_to_exitcode(os.waitpid(forked, 0)[1]))


def _convert_and_exit(order: dict[str, Any], files: list[int], torch: Any) -> NoReturn:
    status = BROKEN
    try:
        source, target = files
        limit(order["memory"], order["seconds"])
        with os.fdopen(source, "rb") as pickle, os.fdopen(target, "wb") as output:
            status = _convert(pickle, output, order["metadata"], order["memory"], torch)
    finally:
        os._exit(status)


def _convert(source: BinaryIO, target: BinaryIO, metadata: dict[str, str], memory: int, torch: Any) -> int:
    """Convert one file; return the exit status."""
    try:
        tensors = _plain(torch.load(source, weights_only=True, map_location="cpu"), torch)
        if tensors is None:
            return NOT_TENSORS
        if sum(_size(tensor) for tensor in tensors.values()) > memory:  # views can be larger than their storage
            return TOO_LARGE
        _write(target, tensors, metadata, torch)
    except MemoryError:
        return NO_MEMORY
    except Exception as error:  # a file can make torch raise any error
        return NO_MEMORY if "alloc" in str(error)[:1000] else BROKEN
    return 0


def limit(memory: int, seconds: int) -> None:
    """Limit the further resource use of this process."""
    import resource  # imported here: not available on every system that imports this module

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    used = resource.getrusage(resource.RUSAGE_SELF)
    until = math.ceil(used.ru_utime + used.ru_stime) + seconds
    limits = {
        resource.RLIMIT_AS: pages * resource.getpagesize() + memory,
        resource.RLIMIT_CPU: until,
        resource.RLIMIT_FSIZE: memory,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NPROC: 0,
    }
    for kind, value in limits.items():
        hard = resource.getrlimit(kind)[1]
        lower = value if hard == resource.RLIM_INFINITY else min(value, hard)
        # At the hard CPU limit the kernel sends SIGKILL, as it does out of memory; at the soft limit SIGXCPU.
        keep_hard = kind == resource.RLIMIT_CPU
        resource.setrlimit(kind, (lower, hard if keep_hard else lower))


def _plain(found: Any, torch: Any) -> dict[str, Any] | None:
    """Return the tensors by name, or None if there are other objects."""
    kinds = torch.Tensor, torch.nn.Parameter
    if not isinstance(found, dict):
        return None
    for name, tensor in found.items():
        if type(name) is not str or type(tensor) not in kinds:
            return None
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or _type(tensor) not in _TYPES:
            return None
    return {name: tensor.detach().resolve_neg() for name, tensor in found.items()}


def _type(tensor: Any) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _size(tensor: Any) -> int:
    return int(tensor.numel()) * _TYPES[_type(tensor)][1]


def _write(target: BinaryIO, tensors: dict[str, Any], metadata: dict[str, str], torch: Any) -> None:
    """Write one tensor after the other, as `icmlora.io.safetensors.encode` orders them."""
    header: dict[str, Any] = {"__metadata__": metadata}
    order = sorted(tensors, key=lambda name: (-_TYPES[_type(tensors[name])][1], name))
    offset = 0
    for name in order:
        tensor = tensors[name]
        end = offset + _size(tensor)
        header[name] = {"dtype": _TYPES[_type(tensor)][0], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    target.write(len(text).to_bytes(8, "little") + text)
    for name in order:
        data = tensors[name].contiguous().reshape(-1).view(torch.uint8)
        target.write(memoryview(data.numpy()))
    target.flush()


if __name__ == "__main__":
    serve(int(sys.argv[1]), sys.argv[2])
