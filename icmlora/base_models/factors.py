"""Low-rank factors added to a base model's modules for a while, with gradients to the factors.

    module(x)  +  B (A x)         A (r, in), B (out, r)

Unlike `icmlora.base_models.attach`, this needs no adapter folder and no PEFT, and training can pass through it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from icmlora.adapter.model import Adapter
from icmlora.base_models.patches import low_rank

# By dotted module name: A (r, in) and B (out, r); dW = B A, scale folded in. Empty stands for the bare base model.
Factors = dict[str, tuple[torch.Tensor, torch.Tensor]]


def factors_of(adapter: Adapter) -> Factors:
    """Return an adapter's factors by module name."""
    return {module.name: (module.a, module.b) for module in adapter.modules}


@contextmanager
def added(model: nn.Module, factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> Iterator[None]:
    """Add dW = B A to linear layers and convolutions inside the block, with gradients to the factors."""

    def adder(a: torch.Tensor, b: torch.Tensor) -> object:
        def hook(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
            x = inputs[0]
            return output + low_rank(module, x, a.to(x), b.to(x))

        return hook

    handles = [model.get_submodule(name).register_forward_hook(adder(a, b)) for name, (a, b) in factors.items()]  # type: ignore[arg-type]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
