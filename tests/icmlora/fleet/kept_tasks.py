"""Adapters that are more than a LoRA, or something else, as folders for the tiny base model."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.cli.tiny_fleet import write_lora
from tests.icmlora.tiny_base import HIDDEN, LABEL

HEAD = "base_model.model.score.weight"
BIAS = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.bias"
NORM = "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector"
FILES = {"tokenizer.json": b'{"version": "1.0"}' * 50, "chat_template.jinja": "{{ grüße }}".encode()}
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def head(rows: int = 600) -> torch.Tensor:
    """Return the trained head that tasks share; it is large enough for a blob of its own."""
    return torch.randn(rows, HIDDEN, generator=torch.Generator().manual_seed(77))


def write_headed(folder: Path, *, seed: int = 5, files: bool = True) -> Path:
    """Write a LoRA with a head, a bias and magnitudes of other types, a header of its own, and a tokenizer."""
    write_lora(folder, seed=seed, rank=2, alpha=3, use_dora=True, modules_to_save=["score"], use_rslora=True)
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(folder / WEIGHTS).items()}
    tensors |= {HEAD: head(), BIAS: torch.randn(HIDDEN).half(), NORM: torch.rand(HIDDEN)}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt", "trainer": "mine"})
    for name, data in FILES.items() if files else ():
        (folder / name).write_bytes(data)
    return folder


def write_loha(folder: Path) -> Path:
    """Write an adapter of another method, with a tokenizer."""
    folder.mkdir(parents=True)
    tensors = {f"base_model.model.model.layers.0.self_attn.q_proj.hada_w1_{half}": torch.ones(4, 4) for half in "ab"}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    fields = {"peft_type": "LOHA", "base_model_name_or_path": LABEL, "r": 4, "target_modules": ["q_proj"]}
    (folder / CONFIG).write_text(json.dumps(fields))
    (folder / "tokenizer.json").write_bytes(FILES["tokenizer.json"])
    return folder


def write_diverged(folder: Path) -> Path:
    """Write a LoRA with a NaN."""
    write_lora(folder, seed=6)
    tensors = load_file(folder / WEIGHTS)
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    return folder


def write_kept(root: Path) -> Path:
    """Write `headed` and `twin`, which share a head and files, and `loha` and `diverged`, of which there is no code."""
    write_headed(root / "headed")
    write_headed(root / "twin", seed=8)
    write_loha(root / "loha")
    write_diverged(root / "diverged")
    return root
