"""Folders of adapters of the sizes that people have: an 8B base, hundreds of module kinds, hundreds of tiny ones."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from icmlora.adapter.layout import ModuleShape
from icmlora.adapter.model import Adapter
from tests.benchmarks import many_tiny
from tests.benchmarks.image_fleet.build import write_fleet
from tests.benchmarks.scale import large

_EXPERT_LAYERS, _EXPERT_RANK, _WIDTH = 2, 8, 128


def save(adapter: Adapter, folder: Path) -> None:
    """Write an adapter of one rank in bfloat16 as PEFT does."""
    tensors = {}
    for module in adapter.modules:
        prefix = f"base_model.model.{module.name}"
        tensors[f"{prefix}.lora_A.weight"] = module.a.to(torch.bfloat16).contiguous()
        tensors[f"{prefix}.lora_B.weight"] = module.b.to(torch.bfloat16).contiguous()
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": adapter.base_model}
    rank = adapter.layout[0].rank
    config |= {"r": rank, "lora_alpha": rank, "target_modules": sorted(adapter.target_modules)}
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def build_large(folder: Path, count: int, spectra: Sequence[torch.Tensor]) -> None:
    """Make adapters of Llama 3 8B's shapes, rank 16 on all linear layers: 84 MB each."""
    for number in range(count):
        adapter = large.make_adapter(large.shapes(), spectra[number:] + spectra[:number], seed=number)
        save(adapter, folder / f"large-{number:02d}")


def build_experts(folder: Path, count: int, kinds: int, spectra: Sequence[torch.Tensor]) -> None:
    """Make adapters of a mixture of experts, three modules in each expert: `kinds` kinds of modules in two layers."""
    layout = [
        ModuleShape(f"model.layers.{layer}.mlp.experts.{expert}.w{which}", _EXPERT_RANK, _WIDTH, _WIDTH)
        for layer in range(_EXPERT_LAYERS)
        for expert in range(kinds // 3)
        for which in (1, 2, 3)
    ]
    for number in range(count):
        few = [values[:_EXPERT_RANK] for values in spectra[number:] + spectra[:number]]
        adapter = large.make_adapter(layout, few, seed=number)
        save(adapter, folder / f"experts-{number:02d}")


def build(name: str, count: int, folder: Path, fleet: Path) -> Path:
    """Make the adapters of a case of the benchmark; returns their folder."""
    if name == "fleet of 20":
        return fleet
    if name.startswith("SDXL"):
        write_fleet(folder, range(count))
        return folder
    spectra = large.spectra_of(fleet)
    if name.startswith("8B"):
        build_large(folder, count, spectra)
    elif "kinds" in name:
        build_experts(folder, count, int(name.split()[0]), spectra)
    else:
        many_tiny.build(folder, count)
    return folder
