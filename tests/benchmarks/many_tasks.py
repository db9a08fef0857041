"""Stores of many tasks: folders of tiny adapters, and rows that share one adapter's files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from icmlora.adapter.layout import ModuleShape, target_modules
from icmlora.adapter.model import Adapter, LoraModule
from registry.store import Store
from tests.benchmarks.sizes.adapters import save

BASE_MODEL = "tiny-llama"
_RANK, _WIDTH, _AT_ONCE = 4, 32, 1_000
_LAYOUT = [
    ModuleShape(f"model.layers.{layer}.self_attn.{kind}", _RANK, _WIDTH, _WIDTH)
    for layer in range(2)
    for kind in ("q_proj", "v_proj")
]


def build(folder: Path, first: int, count: int) -> None:
    """Write adapters of their own numbers: the same number is always the same adapter."""
    for number in range(first, first + count):
        draw = torch.Generator().manual_seed(number)
        modules = [
            LoraModule(
                shape.module,
                torch.randn(_RANK, _WIDTH, generator=draw) / 8,
                torch.randn(_WIDTH, _RANK, generator=draw) / 8,
            )
            for shape in _LAYOUT
        ]
        names = target_modules(shape.module for shape in _LAYOUT)
        save(Adapter(BASE_MODEL, "CAUSAL_LM", names, tuple(modules)), folder / f"task-{number:06d}")


def add_rows(store: str | Path, count: int) -> None:
    """Publish tasks that share the files of the store's first task: its adapter and its code."""
    with Store.open(store) as opened:
        (known,) = opened.tasks()
        for first in range(1, count, _AT_ONCE):
            names = [f"task-{number:06d}" for number in range(first, min(first + _AT_ONCE, count))]
            finals = {name: replace(known.final, source=f"loras/{name}") for name in names}
            opened.publish([replace(known, name=name, final=finals[name], manifest=None) for name in names])
