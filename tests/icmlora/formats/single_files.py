"""Small image adapters in a single file, made tensor by tensor, for tests that need to know every value."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save

Tensors = dict[str, torch.Tensor]
HEADER = {"ss_network_dim": "4", "ss_network_alpha": "2.0", "ss_tag_frequency": '{"1_dog": {"a dog": 3, "\\"q\\"": 1}}'}


def values(*shape: int, seed: int = 0) -> torch.Tensor:
    """Return random values, the same ones for the same arguments."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def linear(down: str, up: str, *, rank: int = 4, inputs: int = 6, outputs: int = 5, seed: int = 0) -> Tensors:
    """Return the factors of a linear layer."""
    return {down: values(rank, inputs, seed=seed), up: values(outputs, rank, seed=seed + 1)}


def kohya(*stems: str, alpha: float | None = 2.0, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensors:
    """Return linear layers as kohya names them."""
    tensors: Tensors = {}
    for number, stem in enumerate(stems or ("lora_unet_mid_block_attentions_0_proj_in",)):
        tensors |= linear(f"{stem}.lora_down.weight", f"{stem}.lora_up.weight", seed=seed + 10 * number)
        if alpha is not None:
            tensors[f"{stem}.alpha"] = torch.tensor(alpha)
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def convolution(stem: str, *, rank: int = 3, kernel: int = 3) -> Tensors:
    """Return a convolution as kohya names it."""
    return {
        f"{stem}.lora_down.weight": values(rank, 4, kernel, kernel),
        f"{stem}.lora_up.weight": values(5, rank, 1, 1),
        f"{stem}.alpha": torch.tensor(1.5),
    }


def file_bytes(tensors: Tensors, metadata: Mapping[str, str] | None = None) -> bytes:
    """Return a file as the safetensors library writes it."""
    return save({name: tensor.contiguous() for name, tensor in tensors.items()}, dict(metadata) if metadata else None)


def write(path: Path, tensors: Tensors, metadata: Mapping[str, str] | None = None) -> Path:
    """Write a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(file_bytes(tensors, metadata))
    return path
