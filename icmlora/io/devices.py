"""The device a user asked for, its precision, and seeding.

"auto" -> cuda, else mps, else cpu      "cuda:1" -> that card or `DeviceUnavailable`
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from typing import Any, TypeVar, cast

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from icmlora.errors import DeviceUnavailable

_Nested = TypeVar("_Nested", bound=tuple[Any, ...])
"""A named tuple of tensors, of tuples and dictionaries of tensors, and of other values, which are not moved."""

_NAME = re.compile(r"(cpu|mps|cuda(?::(\d{1,3}))?)")


def resolve_device(name: str = "auto") -> torch.device:
    """Return the device of a name.

    Raises:
        DeviceUnavailable: The name is unknown, or this machine has no such device.
    """
    if name == "auto":
        other = "mps" if torch.backends.mps.is_available() else "cpu"
        return torch.device("cuda" if torch.cuda.is_available() else other)
    match = _NAME.fullmatch(name)
    if match is None:
        raise DeviceUnavailable(f"unknown device {name!r}", hint="choose auto, cpu, cuda, cuda:N or mps")
    if name.startswith("cuda"):
        return _cuda(name, None if match[2] is None else int(match[2]))
    if name == "mps" and not torch.backends.mps.is_available():
        raise DeviceUnavailable("device 'mps' was requested, but this machine has none", hint="use --device cpu")
    return torch.device(name)


def inference_dtype(device: torch.device) -> torch.dtype:
    """Return the precision that hidden states and losses are computed in on `device`."""
    # float32 on a CPU: with SmolLM2-135M, bfloat16 lowered the retained gain by 0.003 on both tasks tried, and is
    # faster only on processors with instructions for it. Task vectors tolerate it: they moved by under 1 %, while
    # support sets differ by 11 to 30 %. Accelerators are built for bfloat16, so it is their default.
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def gradient_dtype(device: torch.device) -> torch.dtype:
    """Return the precision that gradients through a frozen base model are computed in on `device`."""
    # bfloat16 if the processor has instructions for it: gradients are averages, and the values they update are rounded
    # far more coarsely. On a CPU with AVX512-BF16 (which all CPUs with AMX have too), forward and backward of two texts
    # of 256 tokens took 3.2 s instead of 8 s. Without it, bfloat16 takes a third longer than float32.
    is_fast = device.type != "cpu" or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if is_fast else torch.float32


def texts_at_once(device: torch.device) -> int:
    """Return the batch size for texts through a base model where any size works."""
    # Padding costs a CPU as much as text; an accelerator is mostly idle with a single short text.
    return 1 if device.type == "cpu" else 8


def round_length(length: int, device: torch.device, dtype: torch.dtype) -> int:
    """Return the padded length of a text of `length` tokens, where padding is harmless."""
    # torch compiles a CPU kernel for each shape of a bfloat16 product and keeps a thousand of them: on a base model of
    # 1.5 B parameters, each new length took another 70 MB (docs/results/LOG.md, 2026-12-01).
    step = 16 if device.type == "cpu" and dtype == torch.bfloat16 else 1
    return math.ceil(length / step) * step


def uploaded(values: Any, device: torch.device) -> torch.Tensor:
    """Make an int64 tensor from (nested lists of) integers; the copy to the device is asynchronous."""
    made = torch.tensor(values, dtype=torch.int64)
    # Only a copy from pinned memory overlaps with computation.
    return (made.pin_memory() if device.type == "cuda" else made).to(device, non_blocking=True)


def moved(values: _Nested, device: torch.device) -> _Nested:
    """Copy all tensors of a nested named tuple to a device, one copy per type to save latency."""
    if device.type == "cpu":
        return values
    leaves, form = tree_flatten(values)
    alike = defaultdict[torch.dtype, list[int]](list)
    for place, leaf in enumerate(leaves):
        if isinstance(leaf, torch.Tensor):
            alike[leaf.dtype].append(place)
    for places in alike.values():
        there = _copied_together([leaves[place] for place in places], device)
        for place, leaf in zip(places, there, strict=True):
            leaves[place] = leaf
    return cast(_Nested, tree_unflatten(leaves, form))


def seed_everything(seed: int) -> None:
    """Seed torch's global generators on every device; separate generators are unaffected."""
    torch.manual_seed(seed)


def _copied_together(leaves: list[torch.Tensor], device: torch.device) -> Iterator[torch.Tensor]:
    flat = torch.cat([leaf.flatten() for leaf in leaves])
    if device.type == "cuda":
        flat = flat.pin_memory()  # as in `uploaded`
    parts = torch.split(flat.to(device, non_blocking=True), [leaf.numel() for leaf in leaves])
    return (part.view(leaf.shape) for part, leaf in zip(parts, leaves, strict=True))


def _cuda(name: str, index: int | None) -> torch.device:
    if not torch.cuda.is_available():
        built = torch.version.cuda is not None or torch.version.hip is not None
        fact = "this machine has no usable GPU" if built else "this build of torch has no CUDA support"
        raise DeviceUnavailable(f"device {name!r} was requested, but {fact}", hint="use --device cpu or --device auto")
    count = torch.cuda.device_count()
    if index is not None and index >= count:
        raise DeviceUnavailable(
            f"device {name!r} was requested, but there are {count} GPUs", hint=f"use cuda:0 to cuda:{count - 1}"
        )
    return torch.device(name)
