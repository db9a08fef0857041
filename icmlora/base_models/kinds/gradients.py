"""Enable gradients through a base model with frozen parameters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def gradients_from_inputs(model: nn.Module) -> Iterator[None]:
    """Enable gradients for the inputs of every layer and the outputs of every embedding, inside the block."""

    def as_leaf(value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.is_floating_point() and not value.requires_grad:
            return value.detach().requires_grad_().clone()  # a leaf itself cannot be modified in place
        return value

    layers = [module for module in model.modules() if next(module.children(), None) is None]
    handles = [layer.register_forward_pre_hook(lambda _, inputs: tuple(map(as_leaf, inputs))) for layer in layers]
    tables = [layer for layer in layers if isinstance(layer, nn.Embedding)]
    handles += [table.register_forward_hook(lambda _, __, output: as_leaf(output)) for table in tables]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
