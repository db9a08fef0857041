"""Merge adapters of one base model by PEFT's `LoraModel.add_weighted_adapter`, without the base model.

    module of each adapter, A (r, in) and B (out, r)  ──▶  one linear layer without weights  ──PEFT──▶  merged A and B

PEFT merges layer by layer and reads only the layer widths of the base model, so one layer at a time is enough. Each
module is merged over the adapters that have it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraModel
from torch import nn

from icmlora.adapter.arithmetic import truncated, with_modules
from icmlora.adapter.merge_methods import OF_ONE_RANK, WITH_DENSITY, MergeMethod
from icmlora.adapter.model import Adapter, LoraModule
from icmlora.errors import DataError


def merged(
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    method: MergeMethod,
    *,
    rank: int | None = None,
    density: float = 0.5,
    seed: int = 0,
) -> Adapter:
    """Merge adapters into one; deterministic.

    Args:
        adapters: At least one; the result has the label and task type of the first adapter.
        weights: The factor of each adapter.
        method: One of `METHODS`. `svd` is the best adapter of a rank for the weighted sum of all dW: PEFT's `cat`,
            truncated by singular values of the factors. PEFT's `svd` computes the same from the whole dW.
        rank: Rank for methods that end in `svd`; by default the largest rank of a module in any adapter.
        density: Share of values that a method of `WITH_DENSITY` keeps.
        seed: Seed for the values that `dare` drops.

    Raises:
        DataError: Modules of one name have different widths, or different ranks where the method needs one.
    """
    parts: defaultdict[str, list[tuple[LoraModule, float]]] = defaultdict(list)
    for adapter, weight in zip(adapters, weights, strict=True):
        for module in adapter.modules:
            parts[module.name].append((module, weight))
    how: MergeMethod = "cat" if method == "svd" else method
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        whole = with_modules(adapters[0], [_merged(some, how, rank, density) for some in parts.values()])
    if method != "svd":
        return whole
    return truncated(whole, rank or max(shape.rank for adapter in adapters for shape in adapter.layout))


@torch.no_grad()
def _merged(
    parts: Sequence[tuple[LoraModule, float]], method: MergeMethod, rank: int | None, density: float
) -> LoraModule:
    modules, weights = zip(*parts, strict=True)
    first = modules[0].shape
    for shape in (module.shape for module in modules):
        if (shape.inputs, shape.outputs) != (first.inputs, first.outputs):
            widths = f"{first.inputs} to {first.outputs} and {shape.inputs} to {shape.outputs}"
            raise DataError(f"{first.module} has different widths in these adapters: {widths}")
        if method in OF_ONE_RANK and shape.rank != first.rank:
            fact = f"{method} needs equal ranks, but {first.module} has ranks {first.rank} and {shape.rank}"
            other = "svd" if method == "linear" else f"{method}_svd"
            raise DataError(fact, hint=f"use --method {other}")
    layer = nn.Linear(first.inputs, first.outputs, bias=False, device="meta")
    layer.weight = nn.Parameter(torch.zeros(1, 1).expand(first.outputs, first.inputs), requires_grad=False)
    network = nn.ModuleDict({"merged": layer})
    configs = {  # the scale is in B
        str(number): LoraConfig(r=module.shape.rank, lora_alpha=module.shape.rank, target_modules=["merged"])
        for number, module in enumerate(modules)
    }
    model = LoraModel(network, {"0": configs["0"]}, "0")
    for name, config in list(configs.items())[1:]:
        model.peft_config[name] = config
        model.inject_adapter(network, name)
    factors: Any = network["merged"]
    for name, module in zip(configs, modules, strict=True):
        factors.lora_A[name].weight.copy_(module.a)
        factors.lora_B[name].weight.copy_(module.b)
    model.add_weighted_adapter(
        list(configs),
        list(weights),
        "all",
        combination_type=method,
        svd_rank=rank,
        svd_full_matrices=False,
        density=density if method in WITH_DENSITY else None,
    )
    return LoraModule(first.module, factors.lora_A["all"].weight.detach(), factors.lora_B["all"].weight.detach())
