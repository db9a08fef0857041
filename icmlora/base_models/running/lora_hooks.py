"""Add low-rank factors to a base model's modules temporarily, with gradients to the factors.

    module(x)  +  B (A x)         A (r, in), B (out, r)         `added`: one adapter for the whole batch
    module(x)  +  B_t (A_t x_t)   x_t: the t-th share of x      `added_by_rows`: several tasks, each with its own rows

Unlike `icmlora.base_models.running.attach`, this needs no adapter folder and no PEFT, and it supports training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import nn
from torch.nn import functional

from icmlora.adapter.model import Adapter
from icmlora.base_models.running.conv_as_linear import low_rank
from icmlora.base_models.running.modules import kernel_shape
from icmlora.errors import BaseModelUnsuited

# Dotted module name -> A (r, in) and B (out, r); dW = B A, scale folded in. Empty means the bare base model.
Factors = dict[str, tuple[torch.Tensor, torch.Tensor]]


def factors_of(adapter: Adapter) -> Factors:
    """Return an adapter's factors by module name: A (r, in) and B (out, r)."""
    return {module.name: (module.a, module.b) for module in adapter.modules}


@contextmanager
def added(model: nn.Module, factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> Iterator[None]:
    """Add dW = B A, with A (r, in) and B (out, r), to modules inside the block, with gradients to the factors."""

    def adder(a: torch.Tensor, b: torch.Tensor) -> _Hook:
        def hook(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
            x = inputs[0]
            return output + low_rank(module, x, a.to(x), b.to(x))

        return hook

    hooks = {}
    for name, (a, b) in factors.items():
        # Move factors to the modules' devices once, not in every pass: text generation takes one pass per token.
        # If accelerate has offloaded a module's weights, leave its factors where they are.
        device = next(model.get_submodule(name).parameters()).device
        hooks[name] = adder(a, b) if device.type == "meta" else adder(a.to(device), b.to(device))
    with _hooked(model, hooks):
        yield


@contextmanager
def added_by_rows(model: nn.Module, several: Sequence[Factors], rows: int) -> Iterator[None]:
    """Add the factors of T tasks to linear layers inside the block; a batch has an equal number of rows per task.

    Factors are A (r, in) and B (out, r) by module. `rows` is the size of a batch, sorted by task.

    Raises:
        BaseModelUnsuited: Inside the block, if a module does not compute row by row: a convolution, an expert.
    """

    def adder(a: torch.Tensor, b: torch.Tensor) -> _Hook:
        def hook(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
            x = inputs[0]
            if kernel_shape(module) is not None or x.dim() < 3 or len(x) != rows:
                raise BaseModelUnsuited("its modules do not read one row for each text")
            of_tasks = x.reshape(len(several), -1, x.shape[-1])
            return output + ((of_tasks @ a.to(x)) @ b.to(x)).view_as(output)

        return hook

    names = dict.fromkeys(name for factors in several for name in factors)
    with _hooked(model, {name: adder(*_stacked([factors.get(name) for factors in several])) for name in names}):
        yield


_Hook = Callable[[nn.Module, tuple[torch.Tensor, ...], torch.Tensor], torch.Tensor]


def _stacked(pairs: Sequence[tuple[torch.Tensor, torch.Tensor] | None]) -> tuple[torch.Tensor, torch.Tensor]:
    """Stack factors as (T, in, r) and (T, r, out), zero-padded for tasks with a lower rank or no factors."""
    a, b = next(pair for pair in pairs if pair is not None)
    rank = max(len(pair[0]) for pair in pairs if pair is not None)
    found = [(a.new_zeros(0, a.shape[1]), b.new_zeros(len(b), 0)) if pair is None else pair for pair in pairs]
    wide = [a if len(a) == rank else functional.pad(a, (0, 0, 0, rank - len(a))) for a, _ in found]
    tall = [b if b.shape[1] == rank else functional.pad(b, (0, rank - b.shape[1])) for _, b in found]
    return torch.stack(wide).mT, torch.stack(tall).mT


@contextmanager
def _hooked(model: nn.Module, hooks: Mapping[str, _Hook]) -> Iterator[None]:
    with ExitStack() as stack:
        for name, hook in hooks.items():
            stack.enter_context(model.get_submodule(name).register_forward_hook(hook))
        yield
