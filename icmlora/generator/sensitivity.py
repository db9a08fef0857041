"""How much each input and output channel of the target modules matters, as powers of two.

    dW  --weigh-->  2^o_j dW_ji 2^i_i  --singular vectors, one quantiser step for all-->  small errors where they matter

A uniform step on weighted values is an uneven step on the values themselves, so the step needs no side information: the
weights are part of the generator. They come from the base model, from the mean squares of what goes into a module and
of the loss's gradient behind it (the diagonal of K-FAC, Martens and Grosse, arXiv 1503.05671), taken to a power below
1: full weights trust the base model's Fisher information too far from the base model (docs/results/LOG.md). All weights
are whole halves of an octave: finer ones cost the generator more than they save.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from icmlora.adapter.model import LoraModule
from icmlora.generator.config import GeneratorConfig
from icmlora.generator.scales import OCTAVE

MeanSquares = Mapping[str, tuple[torch.Tensor, torch.Tensor]]
"""By dotted module name: mean squares of inputs (in,) and of output gradients (out,)."""

_CHANNEL_POWER, _LEVEL_POWER = 0.5, 0.25
"""Of root mean squares, within a module and between modules; 1 would be the Fisher information itself, 0 even bits."""
_FLOOR = 0.05
"""Share of the mean that a channel's mean square is raised by: an input that was silent on these texts may speak."""
_RANGE = 12.0
"""Weights lie between 2^-12 and 2^12."""


@dataclass(frozen=True, eq=False)
class Sensitivity:
    """log2 weights of the channels of every module, whole halves."""

    inputs: tuple[torch.Tensor, ...]
    """Per kind, float32, shape (L, in)."""
    outputs: tuple[torch.Tensor, ...]
    """Per kind, float32, shape (L, out)."""

    def to(self, device: torch.device) -> Sensitivity:
        """Move all weights to a device."""
        left, right = (tuple(part.to(device) for part in side) for side in (self.inputs, self.outputs))
        return Sensitivity(left, right)

    def weigh(self, module: LoraModule, kind: int, layer: int) -> LoraModule:
        """Multiply dW with the weights of its channels."""
        left, right = torch.exp2(self.outputs[kind][layer]), torch.exp2(self.inputs[kind][layer])
        return LoraModule(module.name, module.a * right, module.b * left[:, None])

    def unweigh(self, kind: int, layer: torch.Tensor, inputs: torch.Tensor, outputs: torch.Tensor) -> None:
        """Undo `weigh`, in place, for rank slots of one kind.

        Args:
            kind: Index of the module kind.
            layer: Of each slot, shape (n,).
            inputs: Rows of A, shape (n, in).
            outputs: Columns of B, shape (n, out).
        """
        inputs.mul_(torch.exp2(-self.inputs[kind]).index_select(0, layer))
        outputs.mul_(torch.exp2(-self.outputs[kind]).index_select(0, layer))

    def profile(self, kind: int, side: int) -> torch.Tensor:
        """Return log2 of how far each channel lies above the layer's middle, whole eighths, shape (L, size).

        Values whose spread is the same in every channel have this profile once they are weighted.
        """
        weights = (self.inputs, self.outputs)[side][kind]
        middle = (weights.mean(dim=1, keepdim=True) * OCTAVE).round() / OCTAVE
        return weights - middle


def even(config: GeneratorConfig) -> Sensitivity:
    """Return weights of one for all channels: what is used without a base model."""
    sizes = [(kind.inputs, kind.outputs) for kind in config.kinds]
    left = tuple(torch.zeros(config.layers, size) for size, _ in sizes)
    return Sensitivity(left, tuple(torch.zeros(config.layers, size) for _, size in sizes))


def sensitivity_of(config: GeneratorConfig, measured: MeanSquares) -> Sensitivity:
    """Turn what was measured into weights; their mean over all measured modules is one octave-wise.

    Args:
        config: Which modules there are.
        measured: Mean squares; a module that is missing gets weights of one.
    """
    weights = even(config)
    places = [(kind, layer) for kind in range(len(config.kinds)) for layer in range(config.layers)]
    known = [(k, layer, *measured[name]) for k, layer in places if (name := config.kinds[k].module(layer)) in measured]
    if not known:
        return weights
    levels = torch.stack([_log2(squares.mean()) + _log2(gradients.sum()) for _, _, squares, gradients in known])
    levels = (levels - levels.mean()) * _LEVEL_POWER / 4  # of the root, half of it on either side
    for (kind, layer, squares, gradients), level in zip(known, levels, strict=True):
        for target, values in ((weights.inputs, squares), (weights.outputs, gradients)):
            relative = _log2(values / values.mean().clamp_min(torch.finfo(torch.float32).tiny) + _FLOOR)
            target[kind][layer] = ((relative * _CHANNEL_POWER / 2 + level).clamp(-_RANGE, _RANGE) * 2).round() / 2
    return weights


def _log2(values: torch.Tensor) -> torch.Tensor:
    return values.float().clamp_min(torch.finfo(torch.float32).tiny).log2()
