"""Write an adapter as a PEFT folder for one base model, without anything that PEFT would interpret.

    RunnableAdapter, BaseModel --> adapter_config.json     literal module names, one rank, alpha == rank
                                   adapter_model.safetensors   float32, shaped for the base model's layers

It excludes values and rows that replace tensors of the base model: see `icmlora.base_models.running.attach`.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Mapping
from operator import itemgetter
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.functional import pad

from icmlora.adapter.model import Adapter, LoraModule
from icmlora.base_models.modality import BaseModel
from icmlora.base_models.running.modules import Place, check_fits, groups_of, is_fused, kernel_shape, places_of
from icmlora.errors import BaseModelMismatch
from icmlora.formats.format import RunnableAdapter
from icmlora.formats.peft.peft import CONFIG_NAME, WEIGHTS_NAME
from icmlora.formats.peft.tensors import joined

_PREFIX = "base_model.model."
_WRAPPED = ".base_layer"


def write_running_copy(base: BaseModel, runnable: RunnableAdapter, folder: Path) -> None:
    """Write into an existing folder; raise `BaseModelMismatch` if the adapter does not fit the base model."""
    adapter = runnable.adapter
    check_fits(base, adapter.layout)
    modules = dict(base.model.named_modules())
    places = places_of(base, [module.name for module in adapter.modules])
    rank = max(module.a.shape[0] for module in adapter.modules)
    tensors, target_parameters = _of_parameters(modules, adapter, places, rank)
    of_groups, ranks = _of_groups(base, modules, runnable, places)
    tensors |= of_groups
    targets: set[str] = set(ranks)
    for module in adapter.modules:
        place, parameter, _ = places[module.name]
        if parameter is not None or place in ranks:
            continue
        fused = is_fused(modules[place])
        # PEFT renames and fuses the factors of single experts itself; its names for wrapped modules stay as well.
        name = module.name if fused or _WRAPPED in module.name else place
        a, b = _padded(module, rank)
        tensors |= {f"{_PREFIX}{name}.{half}": factor for half, factor in _halves(modules[place], a, b).items()}
        if _WRAPPED not in module.name:
            targets.add(name)
        if module.name in runnable.magnitudes:
            tensors[f"{_PREFIX}{name}.lora_magnitude_vector"] = runnable.magnitudes[module.name]
        if runnable.biases:
            bias = runnable.biases.get(module.name)
            tensors[f"{_PREFIX}{name}.lora_B.bias"] = torch.zeros(len(b)) if bias is None else bias
    names: list[str] | str = sorted(targets)
    endings = tuple(f".{name}" for name in targets)
    if any(name.endswith(endings) for name in modules if name not in targets):  # a list would match these too
        names = "|".join(map(re.escape, names))
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        **({"rank_pattern": ranks, "alpha_pattern": ranks} if ranks else {}),
        "target_modules": names,
        **({"target_parameters": target_parameters} if target_parameters else {}),
        "use_dora": bool(runnable.magnitudes),
        "lora_bias": bool(runnable.biases),
    }
    (folder / CONFIG_NAME).write_text(json.dumps(config))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS_NAME)


def _of_groups(
    base: BaseModel, modules: Mapping[str, nn.Module], runnable: RunnableAdapter, places: Mapping[str, Place]
) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
    """Return the factors of grouped convolutions under PEFT's names, and their ranks by module name."""
    parts: defaultdict[str, dict[int, LoraModule]] = defaultdict(dict)
    for module in runnable.adapter.modules:
        place = places[module.name]
        if place.parameter is None and place.number is not None:
            parts[place.module][place.number] = module
    tensors: dict[str, torch.Tensor] = {}
    ranks: dict[str, int] = {}
    for name, found in parts.items():
        convolution = modules[name]
        if len(found) < groups_of(convolution) or runnable.magnitudes or runnable.biases:
            odd = "not for all groups" if len(found) < groups_of(convolution) else "not a plain LoRA"
            raise BaseModelMismatch(f"the adapter is {odd} of convolution {name!r} of base model {base.label!r}")
        most = max(module.a.shape[0] for module in found.values())
        a, b = joined([_padded(found[number], most) for number in sorted(found)], experts=False)
        tensors |= {f"{_PREFIX}{name}.{half}": factor for half, factor in _halves(convolution, a, b).items()}
        ranks[name] = len(a)
    return tensors, ranks


def _of_parameters(
    modules: Mapping[str, nn.Module], adapter: Adapter, places: Mapping[str, Place], rank: int
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Return the factors of parameters under PEFT's names, and the parameters for its configuration."""
    parts: defaultdict[str, defaultdict[str, list[tuple[int, LoraModule]]]] = defaultdict(lambda: defaultdict(list))
    for module in adapter.modules:
        place = places[module.name]
        if place.parameter is not None:
            parts[place.module][place.parameter].append((place.number or 0, module))
    tensors: dict[str, torch.Tensor] = {}
    for owner, found in parts.items():
        # PEFT wraps a module once per parameter; the first wrapper is the innermost.
        declared = [name for name, _ in modules[owner].named_parameters(recurse=False) if name in found]
        for depth, parameter in enumerate(reversed(declared)):
            experts = [_padded(module, rank) for _, module in sorted(found[parameter], key=itemgetter(0))]
            a, b = joined(experts, experts=True)
            name = f"{_PREFIX}{owner}{depth * _WRAPPED}"
            tensors |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
    return tensors, [f"{owner}.{parameter}" for owner, found in parts.items() for parameter in found]


def _padded(module: LoraModule, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    missing = rank - module.a.shape[0]
    return pad(module.a, (0, 0, 0, missing)), pad(module.b, (0, missing))


def _halves(module: nn.Module, a: torch.Tensor, b: torch.Tensor) -> Mapping[str, torch.Tensor]:
    """Return both factors under PEFT's names and in PEFT's shapes for this layer."""
    if hasattr(module, "num_embeddings"):
        return {"lora_embedding_A": a, "lora_embedding_B": b}
    if (kernel := kernel_shape(module)) is not None:
        a = a.reshape(len(a), -1, *kernel)
        b = b.reshape(*b.shape, *[1] * len(kernel))
    return {"lora_A.weight": a, "lora_B.weight": b}
