"""A codec that no training went into: what it writes is larger, and right."""

from __future__ import annotations

import torch

from icmlora.adapter.model import Adapter, LoraModule
from icmlora.generator.codec.codec import Codec
from icmlora.generator.config import config_for
from icmlora.generator.files.network_file import generator_to_bytes
from icmlora.generator.network.cvae import CVAE

WIDTH = 256


def untrained_codec(*adapters: Adapter) -> Codec:
    """Return the codec of a random network that fits some adapters of one base model."""
    torch.manual_seed(0)
    layouts = [adapter.layout for adapter in adapters]
    net = CVAE(config_for(adapters[0].base_model, layouts, tasks=64, condition_size=0, quality=4))
    return Codec.of(generator_to_bytes(net))


def with_directions(*sizes: float) -> Adapter:
    """Return an adapter whose modules have directions of values with these root mean squares, the strongest first."""
    draw = torch.Generator().manual_seed(0)
    modules = []
    for layer in range(3):
        right, left = (torch.linalg.qr(torch.randn(WIDTH, len(sizes), generator=draw)).Q for _ in range(2))
        roots = torch.tensor(sizes).mul(WIDTH**0.5).sqrt()
        modules.append(LoraModule(f"layers.{layer}.q", (right * roots).T.contiguous(), left * roots))
    return Adapter("base", "CAUSAL_LM", ("q",), tuple(modules))
