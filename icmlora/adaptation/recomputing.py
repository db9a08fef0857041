"""Keep the activations of one layer at a time; backward computes those of the others again (arXiv 1604.06174).

Saves most of the memory of a long pass through a large base model and costs another forward. It pays on accelerators,
whose memory is what limits the size of the base model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

_AMPLE = ("cpu",)
"""Types of devices with memory enough for all activations of a few short texts."""


@contextmanager
def recomputing(model: nn.Module) -> Iterator[None]:
    """Let a model forget what is within its layers, for the block, where it is on an accelerator.

    Forward and backward both belong into the block, and into those of hooks on the layers' modules: they run again.
    The model's own switch needs training mode, which would turn dropout on.

    Args:
        model: A model of the transformers library; layers that it cannot recompute keep their activations.
    """
    is_ample = next(model.parameters()).device.type in _AMPLE
    layers = [layer for layer in model.modules() if isinstance(layer, GradientCheckpointingLayer)]
    changed = [] if is_ample else layers
    for layer in changed:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    try:
        yield
    finally:
        for layer in changed:
            del layer.forward
