"""Enable gradients through a base model with frozen parameters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
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

    with ExitStack() as stack:
        for layer in model.modules():
            if next(layer.children(), None) is None:
                stack.enter_context(layer.register_forward_pre_hook(lambda _, inputs: tuple(map(as_leaf, inputs))))
                if isinstance(layer, nn.Embedding):
                    stack.enter_context(layer.register_forward_hook(lambda _, __, output: as_leaf(output)))
        yield
