"""A synthetic adapter of an 8B model, and a generator for it: the shapes of Llama 3 8B, rank 16, all linear modules.

Each module has the singular values of a real module of rank 16, taken in turn, and random orthonormal factors. Channel
weights are random with the spread that SmolLM2's measured ones have. The generator is not trained: the time of decoding
does not depend on what its parameters are.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path

import torch

from icmlora.adapter.canonical import canonicalize
from icmlora.adapter.layout import ModuleShape, target_modules
from icmlora.adapter.model import Adapter, LoraModule
from icmlora.formats.discovery.folder import load_adapter
from icmlora.formats.peft.peft import CONFIG_NAME
from icmlora.generator.config import GeneratorConfig, config_for
from icmlora.generator.network.cvae import CVAE
from icmlora.generator.sensitivity import Sensitivity, even
from icmlora.training.initialisation import fresh_network
from tests.icmlora.small_fleet import MemoryAdapterSource

RANK, LAYERS = 16, 32
HIDDEN, KEYS, MLP = 4096, 1024, 14336
WIDTHS = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN, KEYS),
    "self_attn.v_proj": (HIDDEN, KEYS),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (HIDDEN, MLP),
    "mlp.up_proj": (HIDDEN, MLP),
    "mlp.down_proj": (MLP, HIDDEN),
}
"""Module to its inputs and outputs."""
WEIGHT_SPREAD = 0.3
"""Standard deviation of SmolLM2's log2 channel weights within a module: measured, 0.23 to 0.39 but for one kind."""


def shapes(layers: int = LAYERS, shrink: int = 1) -> list[ModuleShape]:
    """Return the adapted modules; tests take fewer layers and divide the widths."""
    sizes = {kind: (inputs // shrink, outputs // shrink) for kind, (inputs, outputs) in WIDTHS.items()}
    return [
        ModuleShape(f"model.layers.{layer}.{kind}", RANK, *sizes[kind]) for layer in range(layers) for kind in sizes
    ]


def spectra_of(fleet: Path) -> list[torch.Tensor]:
    """Return the singular values (16,) of every module of the fleet's adapters of rank 16."""
    adapters = [load_adapter(path.parent) for path in sorted(fleet.glob(f"*/{CONFIG_NAME}"))]
    modules = [module for adapter in adapters for module in canonicalize(adapter).modules if module.shape.rank == RANK]
    return [module.a.square().sum(1) for module in modules]


def make_adapter(layout: Sequence[ModuleShape], spectra: Sequence[torch.Tensor], seed: int = 0) -> Adapter:
    """Make an adapter, module by module."""
    draw = torch.Generator().manual_seed(seed)
    modules = []
    for shape, values in zip(layout, cycle(spectra), strict=False):
        right, left = (
            torch.linalg.qr(torch.randn(size, shape.rank, generator=draw))[0] * values.sqrt()
            for size in (shape.inputs, shape.outputs)
        )
        modules.append(LoraModule(shape.module, right.T.contiguous(), left))
    names = target_modules(shape.module for shape in layout)
    return Adapter("synthetic 8B", "CAUSAL_LM", names, tuple(modules))


def make_network(adapter: Adapter) -> CVAE:
    """Make a generator's network for an adapter: plain initial values, norm tables of that adapter."""
    config = config_for(adapter.base_model, [adapter.layout], tasks=64, condition_size=0, quality=4)
    return fresh_network(config, MemoryAdapterSource([[adapter]], sets=0), 0, _weights(config))


def _weights(config: GeneratorConfig) -> Sensitivity:
    """Draw channel weights, whole halves."""
    draw = torch.Generator().manual_seed(0)
    plain = even(config)
    inputs, outputs = (
        tuple((torch.randn(part.shape, generator=draw) * WEIGHT_SPREAD * 2).round() / 2 for part in side)
        for side in (plain.inputs, plain.outputs)
    )
    return Sensitivity(inputs, outputs)
