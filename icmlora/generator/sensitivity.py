"""How much each input and output channel of the target modules matters, as powers of two.

    dW  --weigh-->  2^o_j dW_ji 2^i_i  --singular vectors, one quantiser step for all-->  small errors where they matter

A uniform step on weighted values is an uneven step on the values themselves. The step needs no side information: the
weights are part of the generator. They come from the base model: from the mean squares of a module's inputs and of
the loss's gradient with respect to its outputs (the diagonal of K-FAC, Martens and Grosse, arXiv 1503.05671), taken to
a power below 1. Full weights would trust the base model's Fisher information too far away from the base model
(docs/results/LOG.md). All weights are whole halves of an octave: finer ones cost the generator more than they save.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch

from icmlora.adapter.model import LoraModule
from icmlora.generator.config import GeneratorConfig
from icmlora.generator.scales import OCTAVE

# By dotted module name: mean squares of inputs (in,) and of output gradients (out,).
MeanSquares = Mapping[str, tuple[torch.Tensor, torch.Tensor]]
_Sides = tuple[torch.Tensor, torch.Tensor]  # weights of inputs and outputs

# Powers of root mean squares, within a module and between modules; 1 is the Fisher information, 0 even weights.
_CHANNEL_POWER, _LEVEL_POWER = 0.5, 0.25
# Share of the mean that is added to every mean square: an input that was zero on these texts may not be on others.
_FLOOR = 0.05
_RANGE = 12.0  # weights are between 2^-12 and 2^12
_AT_A_TIME = 1 << 18  # values unweighted together: more would not stay in the processor's cache


@dataclass(frozen=True, eq=False)
class Sensitivity:
    """log2 weights of the channels of every module, in whole halves."""

    inputs: tuple[torch.Tensor, ...]  # per kind, float32, shape (L, in)
    outputs: tuple[torch.Tensor, ...]  # per kind, float32, shape (L, out)
    _inverses: dict[tuple[int, torch.device], tuple[torch.Tensor, torch.Tensor]] = field(
        default_factory=dict, init=False, repr=False
    )

    @cached_property
    def is_even(self) -> bool:
        """Whether all weights are 1, so weighing changes no bit."""
        return not any(weights.any() for weights in (*self.inputs, *self.outputs))

    def to(self, device: torch.device) -> Sensitivity:
        """Move all weights to a device."""
        left, right = (tuple(part.to(device) for part in side) for side in (self.inputs, self.outputs))
        return Sensitivity(left, right)

    def weigh(self, module: LoraModule, kind: int, layer: int) -> LoraModule:
        """Multiply dW by the weights of its channels; returns the same module under even weights."""
        if self.is_even:
            return module
        left, right = torch.exp2(self.outputs[kind][layer]), torch.exp2(self.inputs[kind][layer])
        return LoraModule(module.name, module.a * right, module.b * left[:, None])

    def weigh_rows(self, kind: int, layers: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
        """Weigh A (n, r, in) and B^T (n, r, out) of modules of one kind in place, in layers (n,)."""
        if not self.is_even:
            for rows, weights in zip((a, b), (self.inputs, self.outputs), strict=True):
                rows.mul_(torch.exp2(weights[kind][layers])[:, None])

    def unweigh(self, kind: int, layer: torch.Tensor, inputs: torch.Tensor, outputs: torch.Tensor) -> None:
        """Undo `weigh`, in place, for n rank slots of one kind: layer (n,), inputs (n, in), outputs (n, out)."""
        if self.is_even:
            return
        for values, weights in zip((inputs, outputs), self.inverse(kind, inputs.device), strict=True):
            rows = max(1, _AT_A_TIME // values.shape[1])
            layers = torch.split(layer.to(values.device), rows)
            for part, of_part in zip(torch.split(values, rows), layers, strict=True):
                part.mul_(weights.index_select(0, of_part))

    def inverse(self, kind: int, device: torch.device) -> _Sides:
        """Return factors that undo the weights, shapes (L, in) and (L, out); cached."""
        if (kind, device) not in self._inverses:
            left, right = (torch.exp2(-weights[kind]).to(device) for weights in (self.inputs, self.outputs))
            self._inverses[kind, device] = left, right
        return self._inverses[kind, device]

    def profile(self, kind: int, side: int) -> torch.Tensor:
        """Return log2 of how far each channel is above the layer's mean, in whole eighths, shape (L, size)."""
        # Values with the same spread in every channel have this profile once they are weighted.
        weights = (self.inputs, self.outputs)[side][kind]
        middle = (weights.mean(dim=1, keepdim=True) * OCTAVE).round() / OCTAVE
        return weights - middle


def even(config: GeneratorConfig) -> Sensitivity:
    """Return weights of 1 for all channels, for use without a base model."""
    left = tuple(torch.zeros(config.layers, kind.inputs) for kind in config.kinds)
    return Sensitivity(left, tuple(torch.zeros(config.layers, kind.outputs) for kind in config.kinds))


def sensitivity_of(config: GeneratorConfig, measured: MeanSquares) -> Sensitivity:
    """Turn mean squares into weights, whose log2 has a mean of about 0 over all measured modules."""
    weights = even(config)
    nothing, known = torch.empty(0), []
    for number, kind in enumerate(config.kinds):
        for layer in range(config.layers):
            squares, gradients = measured.get(kind.module(layer), (nothing, nothing))
            if (len(squares), len(gradients)) == (kind.inputs, kind.outputs):
                known.append((number, layer, squares, gradients))
    if not known:
        return weights
    levels = torch.stack([_log2(squares.mean()) + _log2(gradients.sum()) for _, _, squares, gradients in known])
    levels = (levels - levels.mean()) * _LEVEL_POWER / 4  # half for the root, and half of that per side
    for (number, layer, squares, gradients), level in zip(known, levels, strict=True):
        for target, values in ((weights.inputs, squares), (weights.outputs, gradients)):
            relative = _log2(values / values.mean().clamp_min(torch.finfo(torch.float32).tiny) + _FLOOR)
            target[number][layer] = ((relative * _CHANNEL_POWER / 2 + level).clamp(-_RANGE, _RANGE) * 2).round() / 2
    return weights


def _log2(values: torch.Tensor) -> torch.Tensor:
    return values.float().clamp_min(torch.finfo(torch.float32).tiny).log2()
