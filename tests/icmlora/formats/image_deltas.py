"""What an image adapter adds to the weights of its model, computed by the libraries whose formats they are.

    dw_of               by the file's own names of modules: lycoris-lora, or PEFT where the names are PEFT's
    dw_by_diffusers     by the names of the pipeline: diffusers' converters and loaders, then PEFT

Nothing of icm is used: its readers are compared with this.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from diffusers import WanPipeline
from lycoris.modules import get_module, make_module
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.icmlora.formats.image_files import installed_peft

_LYCORIS = re.compile(
    r"(.*?)\.(?:lora_(?:up|down|mid)\.weight|alpha|dora_scale|diff|diff_b|hada_\w+|lokr_\w+|oft_\w+|[ab][12m]\.weight)$"
)


def dw_of(path: Path, model: nn.Module | None = None) -> dict[str, Tensor]:
    """Return the change of each module's weight, in float32, shape of that weight, by LyCORIS' reading of a file.

    For kohya's and LyCORIS' names, which have the prefix in the name of a module ("lora_unet_mid_block_...").
    IA3 and LoKr with `decompose_both` are not among what it reads.

    Args:
        path: The file.
        model: The model it belongs to, or None where all are LoRA: shapes are then taken from the factors.
            DoRA needs it for its weights, and LoHa, LoKr and the rest for their shapes.
    """
    tensors = {name: tensor.float() for name, tensor in load_file(path).items()}
    names = {found[1]: None for name in tensors if (found := _LYCORIS.match(name))}
    modules = {name.replace(".", "_"): module for name, module in model.named_modules()} if model is not None else {}
    deltas = {}
    for name in names:
        original = modules.get(re.sub(r"^(lycoris|lora_unet)_", "", name))
        kind, parts = get_module(tensors, name)
        module = make_module(kind, parts, name, _original(tensors, name) if original is None else original)
        with torch.no_grad():
            if getattr(module, "wd", False):
                merged, _ = module.get_merged_weight(shape=module.shape)
                deltas[name] = (merged - module.org_weight).detach()
            else:
                deltas[name] = module.get_diff_weight()[0].reshape(module.shape).detach()
    return deltas


def dw_by_diffusers(path: Path, pipeline: Any) -> dict[str, Tensor]:
    """Load a file into a pipeline with `load_lora_weights` and return the change of each weight, in float32.

    Names are those of the pipeline: "unet.mid_block.attentions.0...". It stays loaded. Wan's transformer goes without
    a pipeline, which would need its text encoder of 11 GB.
    """
    parts: dict[str, nn.Module]
    if isinstance(pipeline, nn.Module):
        state = WanPipeline.lora_state_dict(path)
        WanPipeline.load_lora_into_transformer(state, pipeline)
        parts = {"transformer": pipeline}
    else:
        with installed_peft():
            pipeline.load_lora_weights(path)
        parts = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
    deltas = {}
    for part, model in parts.items():
        for name, module in model.named_modules():
            if isinstance(module, LoraLayer):
                (adapter,) = module.lora_A
                with torch.no_grad():
                    deltas[f"{part}.{name}"] = module.get_delta_weight(adapter).float()
    return deltas


def _original(tensors: dict[str, Tensor], name: str) -> nn.Module:
    """Return a module of the shape that a LoRA's factors belong to; its weights have no meaning."""
    down, up = tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"]
    if down.ndim == 2:
        return nn.Linear(down.shape[1], up.shape[0], bias=False)
    kernel = tensors.get(f"{name}.lora_mid.weight", down).shape[2:]
    return nn.Conv2d(down.shape[1], up.shape[0], tuple(kernel), bias=False)
