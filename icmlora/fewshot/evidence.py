"""Evidence from a few samples about a base model's modules: how the loss would change each of them.

    samples ──base + start──▶ loss ──backward──▶ per module:   g x^T       (out, in)       gradient
      inputs x (in) of a module, gradients g (out) of its outputs    x^2, g^2    (in,), (out,)   mean squares

All are means over the scored tokens, from one forward and backward pass without any adapter of the task. On an
accelerator the activations of one layer at a time are in memory; backward computes the others again (`recomputing`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from icmlora.base_models.modality import BaseModel, Prepared
from icmlora.base_models.running.conv_as_linear import input_rows, output_rows
from icmlora.base_models.running.lora_hooks import Factors, added
from icmlora.base_models.running.modules import kernel_shape, matrix_shape

_AMPLE = ("cpu",)  # device types with enough memory for all activations of a few short texts


@dataclass(frozen=True, eq=False)
class ModuleEvidence:
    """Evidence about one module, float32 on the base model's device."""

    gradient: torch.Tensor  # gradient of the loss with respect to dW, shape (out, in)
    inputs: torch.Tensor  # mean squares of the module's inputs, shape (in,)
    outputs: torch.Tensor  # mean squares of the loss's gradient with respect to the module's outputs, shape (out,)


@dataclass(frozen=True, eq=False)
class Evidence:
    """Evidence by dotted module name."""

    modules: Mapping[str, ModuleEvidence]  # one entry per module, in the order given
    nats: float  # loss at the point where the evidence was gathered, in nats per token
    tokens: int  # how many tokens were scored


def gather_evidence(
    base: BaseModel, start: Factors, modules: Iterable[str], samples: Sequence[Prepared], *, batch_size: int = 1
) -> Evidence:
    """Run the samples forward and backward once, with factors A (r, in) and B (out, r) on the base model."""
    # Needs 4 * in * out bytes per module in addition to the base model's activations, for any number of samples.
    # Made beforehand: backward reaches the modules in reverse order, and some, such as experts, not at all.
    sums = {}
    for name in modules:
        module = base.model.get_submodule(name)
        if (shape := matrix_shape(module)) is None:
            raise ValueError(f"{name} is neither a linear layer nor a plain convolution")
        device, (outputs, inputs) = next(module.parameters()).device, shape
        sums[name] = [torch.zeros(size, device=device) for size in ((outputs, inputs), (inputs,), (outputs,))]
    nats, tokens = 0.0, sum(item.count for item in samples)
    for first in range(0, len(samples), batch_size):
        batch = samples[first : first + batch_size]
        real = base.modality.counted(base, batch)  # (rows, T)
        with added(base.model, start), _summing(base.model, real, sums), recomputing(base.model):
            loss = base.modality.loss(base, batch)  # summed over the scored tokens, in nats
            loss.backward()  # type: ignore[no-untyped-call]
        nats += float(loss.detach())
    found = {name: ModuleEvidence(*(part / tokens for part in parts)) for name, parts in sums.items()}
    return Evidence(found, nats / tokens, tokens)


@contextmanager
def mean_loss(base: BaseModel, factors: Factors, batch: Sequence[Prepared]) -> Iterator[torch.Tensor]:
    """Yield the loss of some samples in nats per token: a scalar, with gradients to factors that require them."""
    # Call backward inside the block: on an accelerator it recomputes activations, with the factors in place.
    with added(base.model, factors), recomputing(base.model):
        yield base.modality.loss(base, batch) / sum(item.count for item in batch)


@contextmanager
def recomputing(model: nn.Module) -> Iterator[None]:
    """On an accelerator, keep no activations inside the model's layers (Chen et al., arXiv 1604.06174)."""
    # Saves most of the memory of a long pass through a large base model, and costs another forward pass. Forward and
    # backward both belong in the block, and in the blocks of hooks on the layers' modules, which run again. The
    # model's own switch would need training mode, and that turns dropout on.
    from transformers.modeling_layers import GradientCheckpointingLayer  # takes a second

    is_ample = next(model.parameters()).device.type in _AMPLE
    layers = [layer for layer in model.modules() if isinstance(layer, GradientCheckpointingLayer)]
    # A layer has its own `forward` where accelerate has spread the model over several devices.
    changed = {} if is_ample else {layer: layer.__dict__.get("forward") for layer in layers}
    for layer in changed:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    try:
        yield
    finally:
        for layer, own in changed.items():
            del layer.forward
            if own is not None:
                layer.forward = own


@contextmanager
def _summing(model: nn.Module, real: torch.Tensor | None, sums: Mapping[str, list[torch.Tensor]]) -> Iterator[None]:
    """Add products of inputs and gradients to `sums` inside the block."""
    # real: (rows, T), True for tokens that are not padding; None if there is no padding. sums: for each module a
    # gradient (out, in) and two rows of squares, (in,) and (out,).

    def watched(parts: list[torch.Tensor]) -> Callable[[nn.Module, tuple[torch.Tensor, ...], torch.Tensor], Any]:
        return lambda module, inputs, outputs: _Watched.apply(outputs, inputs[0], module, real, parts)  # type: ignore[no-untyped-call]

    handles = [model.get_submodule(name).register_forward_hook(watched(parts)) for name, parts in sums.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Watched(torch.autograd.Function):
    """Pass a module's outputs on; backward adds products of its inputs and their gradient to `sums`."""

    # Inputs are saved through autograd, not in a closure, so `recomputing` can drop and recompute them.

    @staticmethod
    def forward(
        ctx: Any,
        outputs: torch.Tensor,
        inputs: torch.Tensor,
        module: nn.Module,
        real: torch.Tensor | None,
        sums: list[torch.Tensor],
    ) -> torch.Tensor:
        ctx.save_for_backward(inputs)
        ctx.module, ctx.real, ctx.sums = module, real, sums
        return outputs.view_as(outputs)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
        (inputs,) = ctx.saved_tensors
        if ctx.real is None or kernel_shape(ctx.module) is not None:
            x, g = input_rows(ctx.module, inputs), output_rows(ctx.module, gradient)  # (rows, in), (rows, out)
        else:
            x, g = inputs[ctx.real], gradient[ctx.real]  # (tokens, in), (tokens, out)
        parts = (g.T @ x, x.float().square().sum(0), g.float().square().sum(0))
        for total, part in zip(ctx.sums, parts, strict=True):
            total += part
        return gradient, None, None, None, None
