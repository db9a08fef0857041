"""Tokens from the prior alone: what `generate` puts in the place of a code."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from icmlora.generator.cvae import CVAE, TaskState
from icmlora.generator.tokens import KindTokens


def predicted_tokens(net: CVAE, state: TaskState, modules: Sequence[tuple[int, int, int]]) -> list[KindTokens]:
    """Predict the tokens of an adapter.

    Args:
        net: The generator's network.
        state: The task.
        modules: Sorted (kind, layer, rank).
    """
    gains = net.gains(state)
    groups = []
    for kind in sorted({kind for kind, _, _ in modules}):
        rows = [(layer, slot) for k, layer, rank in modules if k == kind for slot in range(rank)]
        layer, slot = torch.tensor(rows).T
        norm = torch.exp2(net.norm_mean[kind, layer, slot] + gains[kind])
        mean = net.decode(kind, layer, slot, state)
        groups.append(_resized(KindTokens(kind, layer, slot, norm, mean.inputs, mean.outputs)))
    return groups


def _resized(group: KindTokens) -> KindTokens:
    """Scale predicted directions to tokens whose dW lies between least squares and the expected size.

    The mean direction of uncertain tokens is shorter than one, and dW shrinks with its square. Least squares wants
    that; a working adapter needs more. The size is raised half way, in logarithms, to the one predicted for dW.
    """
    confidence = group.inputs.norm(dim=1) * group.outputs.norm(dim=1)  # (n,)
    predicted = (group.norm * confidence).square().sum().sqrt()
    expected = group.norm.square().sum().sqrt()
    factor = (expected / predicted.clamp_min(1e-12)).sqrt().clamp(max=1e3) if predicted > 0 else predicted
    root = group.norm[:, None] * factor.sqrt()
    return KindTokens(group.kind, group.layer, group.slot, group.norm, root * group.inputs, root * group.outputs)
