"""Treat convolutions as linear layers over patches, so that row-based code handles them too.

    linear layer    inputs (..., in)            rows (n, in)
    convolution     inputs (n, c, h, w)         rows (n * places, c * kernel): the patch at each place

For a convolution, an adapter's A is stored flat, (r, c * kernel), and its B as (out, r).
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from icmlora.base_models.running.modules import kernel_shape


def input_rows(module: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    """Return the input rows of a layer's matrix product, (rows, in)."""
    if (kernel := kernel_shape(module)) is None:
        return inputs.reshape(-1, inputs.shape[-1])
    steps = {"stride": module.stride, "padding": module.padding, "dilation": module.dilation}
    columns = functional.unfold(inputs, kernel, **steps)  # type: ignore[arg-type]  # (n, in, places)
    return columns.transpose(1, 2).reshape(-1, columns.shape[1])


def output_rows(module: nn.Module, outputs: torch.Tensor) -> torch.Tensor:
    """Return a layer's outputs or their gradients in the order of `input_rows`, (rows, out)."""
    last = outputs if kernel_shape(module) is None else outputs.movedim(1, -1)
    return last.reshape(-1, last.shape[-1])


def low_rank(module: nn.Module, inputs: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return the output change of a layer for dW = B A, with A (r, in) and B (out, r)."""
    if (kernel := kernel_shape(module)) is None:
        return (inputs @ a.T) @ b.T
    down = a.reshape(len(a), -1, *kernel)
    hidden = functional.conv2d(inputs, down, None, module.stride, module.padding, module.dilation)  # type: ignore[call-overload]
    return functional.conv2d(hidden, b[:, :, None, None])
