"""Quantise the weights of a base model on loading, with transformers and bitsandbytes (`icm base add --load-in`).

    linear layers                  nf4: 4 bits and a scale per 64 weights       int8: 8 bits and a scale per row
    embeddings, norms, heads       bfloat16, which is also the compute precision of all layers on every device

As a result, "nf4" means the same in every measurement, and one copy in memory suffices. nf4 is the format for which
QLoRA trains adapters (Dettmers et al., arXiv 2305.14314), with 8-bit scales; int8 is LLM.int8() (arXiv 2208.07339).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module

HEADS = ("classifier.", "score.", "classification_head.", "pre_classifier.", "pooler.", "bert.pooler.")
"""Prefixes of head modules in transformers' classifiers; a base model may lack them, and adapters provide them."""

BYTES = {"nf4": 0.52, "int8": 1.01}
"""Bytes per weight of a linear layer, including its share of the scales."""


def kept(outline: nn.Module) -> list[str]:
    """Return the modules that stay in bfloat16: the output layer, modules tied to it, and heads."""
    return sorted({*get_keys_to_not_convert(outline), *(name.rstrip(".") for name in HEADS)})


def packed(outline: nn.Module) -> set[str]:
    layers, rest = (nn.Linear, Conv1D), kept(outline)  # exact types only: subclasses may differ
    named = outline.named_modules()
    return {name for name, module in named if type(module) in layers and should_convert_module(name, rest)}


def quantization_config(load_in: str, outline: nn.Module) -> Any:
    import icmlora.io.quiet_bitsandbytes  # noqa: F401  # before transformers imports it

    options: dict[str, Any] = {"load_in_8bit": True}
    if load_in == "nf4":
        options = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
        options["bnb_4bit_compute_dtype"] = torch.bfloat16
    return BitsAndBytesConfig(**options, llm_int8_skip_modules=kept(outline))  # type: ignore[no-untyped-call]


def settle(model: nn.Module) -> None:
    """Make a quantised network compute the same on every CPU, with gradients."""
    for module in model.modules():
        # On CPUs with AVX512-BF16, the first pass without gradients would repack the weights in place for a kernel
        # that autograd does not support: later gradients are silently wrong by a factor of hundreds.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
        if hasattr(module, "init_8bit_state"):
            module.init_8bit_state = partial(_init_state, module)  # type: ignore[assignment]


def _init_state(module: Any) -> None:
    """Initialise the state of an int8 layer as bitsandbytes does, but keep the scales on the weight."""
    # In each DoRA pass on a CPU, PEFT moves the weight, which would lose its scales and then fail.
    module.state.CB, module.state.SCB = module.weight.CB, module.weight.SCB
    module.weight.CB = None


def stored_bytes(model: nn.Module) -> int:
    """Return the bytes of a network's parameters and buffers, including quantisation scales."""
    total = 0
    for tensor in (*model.parameters(), *model.buffers()):
        total += tensor.nbytes
        if (state := getattr(tensor, "quant_state", None)) is not None:
            scales = [state.absmax, state.offset, *([] if state.state2 is None else [state.state2.absmax])]
            total += sum(scale.nbytes for scale in scales if scale is not None)
        if (scale := getattr(tensor, "SCB", None)) is not None:
            total += scale.nbytes
    return total
