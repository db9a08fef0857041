"""Decide in what precision and where a base model's weights go, as arguments of transformers' `from_pretrained`.

    CPU, or a card that was named          the whole model goes there
    any card, and one is large enough      the same
    any card, and none is large enough     accelerate spreads it over all cards, and the memory of the CPU

A model in few bits is spread over cards only: bitsandbytes does not take layers out of the CPU's memory and back.
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

_SHARE = 0.9  # of the free memory that weights may take; the rest is for what the layers compute


def placement(found: FoundBase, auto_class: str, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Return the arguments that load a Hugging Face folder with one of transformers' Auto classes.

    Args:
        found: Where it is, and in how few bits it is wanted.
        auto_class: Such as "AutoModelForCausalLM".
        device: Where to put it; a card without a number stands for any card.
        dtype: Precision of the weights that are not in few bits.

    Returns:
        The arguments. Without a `device_map` among them the model is loaded on the CPU and can be moved.

    Raises:
        BaseModelUnsuited: It has no layer that could be loaded in few bits.
        BaseModelNotFound: It does not fit any memory.
    """
    options: dict[str, Any] = {"dtype": dtype}
    is_free = device.type == "cuda" and device.index is None
    if found.load_in is None and not is_free:
        return options
    outline = _outline(found, auto_class)
    if found.load_in is not None:
        if not packed(outline):
            raise BaseModelUnsuited(f"base model {found.label!r} has no layer that {found.load_in} can quantise")
        options["quantization_config"] = quantization_config(found.load_in, outline)
        options["device_map"] = {"": device}
    if is_free:
        needed = needed_bytes(outline, dtype, found.load_in)
        if needed > _SHARE * torch.cuda.mem_get_info(device)[0]:
            options |= _spread(found, needed)
    return options


def needed_bytes(outline: nn.Module, dtype: torch.dtype, load_in: str | None) -> int:
    """Return about how many bytes the weights of a network take; the network itself may be without any."""
    few = packed(outline) if load_in is not None else set()
    weights = [module.weight for name, module in outline.named_modules() if name in few]
    small = sum(weight.numel() for weight in weights if isinstance(weight, torch.Tensor))
    rest = sum(parameter.numel() for parameter in outline.parameters()) - small
    return round(rest * dtype.itemsize + (small * BYTES[load_in] if load_in is not None else 0))


def main_device(model: Any) -> torch.device:
    """Return where a model's inputs go: where its weights are, or where accelerate computes with the first of them."""
    device_map: Mapping[str, Any] | None = getattr(model, "hf_device_map", None)
    if device_map is None:
        device: torch.device = next(model.parameters()).device
        return device
    places = [place for place in device_map.values() if place not in ("cpu", "disk")]
    return torch.device(places[0] if places else "cpu")


def _spread(found: FoundBase, needed: int) -> dict[str, Any]:
    from accelerate.utils import get_max_memory

    memory: dict[int | str, int] = get_max_memory()  # card, or "cpu" -> free bytes
    if found.load_in is not None:
        memory.pop("cpu", None)
    free = sum(memory.values())
    if needed > _SHARE * free:
        fact = f"base model {found.label!r} needs {human_size(needed)}, but only {human_size(free)} are free"
        raise BaseModelNotFound(fact, path=found.path, hint=smaller(found))
    return {"device_map": "auto", "max_memory": {place: round(_SHARE * size) for place, size in memory.items()}}


def smaller(found: FoundBase) -> str:
    """Return which options make a base model take less memory of a card."""
    load_in = f"run `icm base add {found.label} PATH --load-in nf4` to load it in 4 bits"
    return load_in if found.load_in is None else "use --device cpu"


def _outline(found: FoundBase, auto_class: str) -> nn.Module:
    """Make the network of a folder without its weights."""
    config = AutoConfig.from_pretrained(found.path, local_files_only=True, trust_remote_code=False)
    with torch.device("meta"):
        outline: nn.Module = getattr(transformers, auto_class).from_config(config, trust_remote_code=False)
    return outline
