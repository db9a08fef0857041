"""A codec that no training went into: what it writes is larger, and right."""

from __future__ import annotations

import torch

from icmlora.adapter.model import Adapter
from icmlora.generator.codec import Codec
from icmlora.generator.config import config_for
from icmlora.generator.cvae import CVAE
from icmlora.generator.network_file import generator_from_bytes, generator_to_bytes


def untrained_codec(*adapters: Adapter) -> Codec:
    """Return the codec of a random network that fits some adapters of one base model."""
    torch.manual_seed(0)
    layouts = [adapter.layout for adapter in adapters]
    net = CVAE(config_for(adapters[0].base_model, layouts, tasks=64, condition_size=0, quality=4))
    return Codec(generator_from_bytes(generator_to_bytes(net)))
