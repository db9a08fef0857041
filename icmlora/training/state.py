"""The state of an unfinished training run as two safetensors files: the network and its optimiser.

There is no pickle and no random state: every step draws from its own stream (icmlora/training/loop.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from icmlora.errors import AdapterRefused, GeneratorError
from icmlora.generator.config import GeneratorConfig
from icmlora.generator.files.network_file import diverged
from icmlora.generator.network.cvae import CVAE
from icmlora.io.tensors import decode_torch, encode_torch
from icmlora.training.config import TrainConfig

NETWORK_FORMAT, OPTIMIZER_FORMAT = "icm training network 1", "icm training optimizer 1"
_MOMENTS = ("exp_avg", "exp_avg_sq")
_COUNTS = "counts"  # updates of each parameter; 0 for a parameter that no step has touched, which has no moments yet


@dataclass(eq=False)
class TrainState:
    """A network with its optimiser after `step` steps."""

    net: CVAE
    optimizer: torch.optim.AdamW
    config: TrainConfig
    step: int

    def network_bytes(self) -> bytes:
        """Serialise the network in float32, the precision that the run computes in."""
        header = {"format": NETWORK_FORMAT, "config": self.net.config.to_json(), "step": str(self.step)}
        return _encode(self.net.state_dict(), header)

    def optimizer_bytes(self) -> bytes:
        """Serialise the optimiser's moments in float32, with the options of the run."""
        counts = torch.zeros(len(list(self.net.parameters())))
        tensors = {_COUNTS: counts}
        for number, moments in self.optimizer.state_dict()["state"].items():
            counts[number] = moments["step"]
            tensors |= {f"{number}.{name}": moments[name] for name in _MOMENTS}
        header = {
            "format": OPTIMIZER_FORMAT,
            "train": self.config.to_json(),
            "step": str(self.step),
        }
        return _encode(tensors, header)


def new_state(net: CVAE, config: TrainConfig) -> TrainState:
    """Start a run with a fresh optimiser."""
    return TrainState(net, _optimizer(net, config), config, 0)


def state_from_bytes(network: bytes, optimizer: bytes, device: torch.device) -> TrainState:
    """Restore a run from its network and optimiser; raise `GeneratorError` if they are damaged or do not match."""
    header, parameters = _parse(network, NETWORK_FORMAT)
    progress, moments = _parse(optimizer, OPTIMIZER_FORMAT)
    try:
        if header["step"] != progress["step"]:
            raise GeneratorError("the network and the optimiser come from different training steps")
        config = TrainConfig.from_json(progress["train"])
        net = CVAE(GeneratorConfig.from_json(header["config"]))
        net.load_state_dict(parameters)
        adam = _optimizer(net.to(device), config)
        # A fresh optimiser has no moments; they are put where AdamW would have made them.
        stored = adam.state_dict()
        stored["state"] = {
            number: {"step": torch.tensor(count)} | {name: moments[f"{number}.{name}"] for name in _MOMENTS}
            for number, count in enumerate(moments[_COUNTS].tolist())
            if count
        }
        adam.load_state_dict(stored)
        return TrainState(net, adam, config, int(progress["step"]))
    except (KeyError, ValueError, RuntimeError) as error:
        raise GeneratorError(f"the training state cannot be read ({error})") from error


def _encode(tensors: dict[str, torch.Tensor], header: dict[str, str]) -> bytes:
    try:
        return encode_torch(tensors, header, dtype="float32")
    except AdapterRefused as error:
        raise diverged() from error


def _parse(data: bytes, expected: str) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    try:
        header, tensors = decode_torch(data)
    except AdapterRefused as error:
        raise GeneratorError(f"not a complete training state file ({error.message})") from error
    if header.get("format") != expected:
        raise GeneratorError(f"not a file of format {expected!r}")
    return header, tensors


def _optimizer(net: CVAE, config: TrainConfig) -> torch.optim.AdamW:
    # Both update all parameters together: in a few calls, on a card in one operation.
    is_card = next(net.parameters()).device.type != "cpu"
    how = {"fused": True} if is_card else {"foreach": True}
    rate, decay = config.rate_at(0), config.weight_decay
    return torch.optim.AdamW(net.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=decay, **how)
