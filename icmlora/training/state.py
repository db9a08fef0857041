"""A training run in the middle: parameters, optimiser and step as one safetensors file. No pickle, no RNG state."""

from __future__ import annotations

import json
from dataclasses import dataclass

import torch

from icmlora.errors import AdapterRefused, GeneratorError
from icmlora.generator.config import GeneratorConfig
from icmlora.generator.cvae import CVAE
from icmlora.torch_tensors import decode_torch, encode_torch
from icmlora.training.config import TrainConfig

FORMAT = "icm training state 1"
_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(eq=False)
class TrainState:
    """A network with its optimiser after `step` steps."""

    net: CVAE
    optimizer: torch.optim.AdamW
    config: TrainConfig
    step: int

    def to_bytes(self) -> bytes:
        """Serialise in float32, which is what the run computes in."""
        tensors = {f"net.{name}": tensor for name, tensor in self.net.state_dict().items()}
        counts: dict[str, float] = {}
        for number, moments in self.optimizer.state_dict()["state"].items():
            counts[str(number)] = float(moments["step"])
            tensors |= {f"optimizer.{number}.{name}": moments[name] for name in _MOMENTS}
        header = {
            "format": FORMAT,
            "config": self.net.config.to_json(),
            "train": self.config.to_json(),
            "state": json.dumps({"step": self.step, "optimizer_steps": counts}, sort_keys=True),
        }
        return encode_torch(tensors, header, dtype="float32")


def new_state(net: CVAE, config: TrainConfig) -> TrainState:
    """Start a run."""
    return TrainState(net, _optimizer(net, config), config, 0)


def state_from_bytes(data: bytes, device: torch.device) -> TrainState:
    """Continue a run.

    Raises:
        GeneratorError: Not a training state.
    """
    try:
        header, tensors = decode_torch(data)
    except AdapterRefused as error:
        raise GeneratorError(f"not a whole training state ({error.message})") from error
    if header.get("format") != FORMAT:
        raise GeneratorError("not a training state, or of another format")
    try:
        config = TrainConfig.from_json(header["train"])
        progress = json.loads(header["state"])
        net = CVAE(GeneratorConfig.from_json(header["config"]))
        prefix = "net."
        net.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
        net = net.to(device)
        optimizer = _optimizer(net, config)
        stored = optimizer.state_dict()
        stored["state"] = {
            int(number): {"step": torch.tensor(count)} | {m: tensors[f"optimizer.{number}.{m}"] for m in _MOMENTS}
            for number, count in progress["optimizer_steps"].items()
        }
        optimizer.load_state_dict(stored)
        return TrainState(net, optimizer, config, int(progress["step"]))
    except (KeyError, ValueError, RuntimeError) as error:
        raise GeneratorError(f"the training state cannot be read ({error})") from error


def _optimizer(net: CVAE, config: TrainConfig) -> torch.optim.AdamW:
    rate = config.rate_at(0)
    return torch.optim.AdamW(net.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=config.weight_decay)
