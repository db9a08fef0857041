"""Choose precision and devices of a base model's weights, as arguments of transformers' `from_pretrained`.

    CPU, or a specific GPU                 the whole model goes there
    any GPU, and the model fits            the same
    any GPU, and the model does not fit    accelerate spreads it over all GPUs and CPU memory

A quantised model is spread over GPUs only, because bitsandbytes does not swap layers with CPU memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import transformers
from transformers import AutoConfig

from icmlora.base_models.quantised import BYTES, packed, quantization_config
from icmlora.errors import BaseModelNotFound, BaseModelUnsuited
from icmlora.io.text import human_size

if TYPE_CHECKING:
    from torch import nn

    from icmlora.base_models.finding.lookup import FoundBase

_SHARE = 0.9  # of the free memory, for weights; the rest is for activations


def placement(found: FoundBase, auto_class: str, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Return the arguments for loading a Hugging Face folder with a transformers Auto class.

    "cuda" without an index means any GPU. `dtype` is the precision of the weights that are not quantised. Without a
    `device_map`, the model is loaded on the CPU and can be moved.

    Raises:
        BaseModelUnsuited: It has no layer that can be quantised.
        BaseModelNotFound: It does not fit into memory.
    """
    options: dict[str, Any] = {"dtype": dtype}
    is_free = device.type == "cuda" and device.index is None
    if found.load_in is None and not is_free:
        return options
    config = AutoConfig.from_pretrained(found.path, local_files_only=True, trust_remote_code=False)
    with torch.device("meta"):  # without weights
        outline: nn.Module = getattr(transformers, auto_class).from_config(config, trust_remote_code=False)
    if found.load_in is not None:
        if not packed(outline):
            raise BaseModelUnsuited(f"base model {found.label!r} has no layer that {found.load_in} can quantise")
        options["quantization_config"] = quantization_config(found.load_in, outline)
        options["device_map"] = {"": device}
    if is_free:
        needed = needed_bytes(outline, dtype, found.load_in)
        if needed > _SHARE * torch.cuda.mem_get_info(device)[0]:
            from accelerate.utils import get_max_memory

            memory: dict[int | str, int] = get_max_memory()  # card, or "cpu" -> free bytes
            if found.load_in is not None:
                memory.pop("cpu", None)
            free = sum(memory.values())
            if needed > _SHARE * free:
                fact = f"base model {found.label!r} needs {human_size(needed)}, but only {human_size(free)} are free"
                raise BaseModelNotFound(fact, path=found.path, hint=smaller(found))
            options["device_map"] = "auto"
            options["max_memory"] = {place: round(_SHARE * size) for place, size in memory.items()}
    return options


def needed_bytes(outline: nn.Module, dtype: torch.dtype, load_in: str | None) -> int:
    """Estimate the bytes of a network's weights; the network may be on the meta device."""
    few = packed(outline) if load_in is not None else set()
    weights = [module.weight for name, module in outline.named_modules() if name in few]
    small = sum(weight.numel() for weight in weights if isinstance(weight, torch.Tensor))
    rest = sum(parameter.numel() for parameter in outline.parameters()) - small
    return round(rest * dtype.itemsize + (small * BYTES[load_in] if load_in is not None else 0))


def main_device(model: Any) -> torch.device:
    """Return the device for a model's inputs: its weights' device, or the first compute device of accelerate's map."""
    device_map: Mapping[str, Any] | None = getattr(model, "hf_device_map", None)
    if device_map is None:
        device: torch.device = next(model.parameters()).device
        return device
    places = [place for place in device_map.values() if place not in ("cpu", "disk")]
    return torch.device(places[0] if places else "cpu")


def smaller(found: FoundBase) -> str:
    """Return a hint for fitting a base model into GPU memory."""
    load_in = f"run `icm base add {found.label} PATH --load-in nf4` to load it in 4 bits"
    return load_in if found.load_in is None else "use --device cpu"
