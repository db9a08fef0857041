"""Small real adapters as bytes and folders, and tensor files that are wrong on purpose."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from icmlora.adapter.layout import target_modules
from icmlora.adapter.model import Adapter, LoraModule

BASE = "tiny/llama"
INPUTS = 6
OUTPUTS = 5
Q0 = "model.layers.0.self_attn.q_proj"
V0 = "model.layers.0.self_attn.v_proj"


def key(module: str, half: str) -> str:
    """Return PEFT's name of a factor; half is "A" or "B"."""
    return f"base_model.model.{module}.lora_{half}.weight"


def factors(
    modules: tuple[str, ...] = (Q0, V0), rank: int = 2, seed: int = 0, inputs: int = INPUTS, outputs: int = OUTPUTS
) -> dict[str, torch.Tensor]:
    """Return random factors under PEFT's names."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for module in modules:
        tensors[key(module, "A")] = torch.randn(rank, inputs, generator=generator)
        tensors[key(module, "B")] = torch.randn(outputs, rank, generator=generator)
    return tensors


def weights(tensors: Mapping[str, torch.Tensor] | None = None, dtype: str = "float32") -> bytes:
    """Return a tensor file as the safetensors library writes it, which takes any values."""
    chosen = factors() if tensors is None else tensors
    narrow = {name: tensor.to(getattr(torch, dtype)).contiguous() for name, tensor in chosen.items()}
    return save(narrow, {"format": "pt"})


def config(**fields: Any) -> bytes:
    """Return an adapter_config.json of rank 2 and alpha 2, changed by the fields given."""
    plain = {"peft_type": "LORA", "base_model_name_or_path": BASE, "r": 2, "lora_alpha": 2, "task_type": "CAUSAL_LM"}
    return json.dumps({**plain, **fields}).encode()


def write_adapter(folder: Path, *, seed: int = 0, **fields: Any) -> Path:
    """Write a valid adapter as a PEFT folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_bytes(config(**fields))
    (folder / "adapter_model.safetensors").write_bytes(weights(factors(seed=seed)))
    return folder


def adapter(*modules: tuple[str, torch.Tensor, torch.Tensor]) -> Adapter:
    """Return an adapter in memory from names and factors."""
    loras = tuple(LoraModule(name, a, b) for name, a, b in modules)
    return Adapter(BASE, "CAUSAL_LM", target_modules(name for name, _, _ in modules), loras)


def tensor_file(header: object, data: bytes = b"") -> bytes:
    """Return a tensor file with any header: text as it is, anything else as JSON."""
    text = header.encode() if isinstance(header, str) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(begin: int = 0, end: int = 4, shape: object = (1,), dtype: object = "F32") -> dict[str, Any]:
    """Return one tensor's entry in a header."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
