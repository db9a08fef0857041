"""The paper's network as a method: one network for the fleet, its decoder in bfloat16, two numbers per task.

Each adapter is flattened and standardised by its own mean and deviation, which are stored (the released code takes
them from the adapter it is to make). What is made is the decoder's answer to the task's condition at z = 0. Neither
the encoder nor the optimiser is counted. What a killed run has trained is kept in the work folder.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from icmlora.adapter.model import Adapter, LoraModule
from icmlora.io.staging import writing_file
from icmlora.io.tensors import decode_torch, encode_torch
from tests.benchmarks.baselines.head import ByteReader, Head
from tests.benchmarks.rate_distortion import flat_cvae
from tests.benchmarks.rate_distortion.fleet import FleetFolder
from tests.benchmarks.rate_distortion.method import Coded

_LEARNING_RATE = 1e-3


@dataclass(frozen=True)
class CvaeMethod:
    """One seed.

    Attributes:
        seed: Of initial weights, order and noise.
        steps: Training steps of one adapter each.
        channels: The paper's; others are for tests.
    """

    seed: int
    steps: int = 400
    channels: tuple[int, ...] = field(default=flat_cvae.CHANNELS)

    def identity(self) -> str:
        """Return seed, steps and shape."""
        return f"flat cvae 1 {self.seed} {self.steps} {self.channels}"

    def code(self, fleet: FleetFolder, work: Path) -> Coded:
        """Train, or read what was trained."""
        stored = work / "decoder.safetensors"
        if not stored.exists():
            work.mkdir(parents=True, exist_ok=True)
            with writing_file(stored) as stream:
                stream.write(self.train(fleet))
        shared = stored.read_bytes()
        names = list(fleet)
        codes = {task: code_of(fleet[task]) for task in names}
        decoder = self._decoder(fleet, shared)
        sizes = {task: len(code) for task, code in codes.items()}
        return Coded(len(shared), sizes, lambda task: _decode(decoder, names.index(task), len(names), codes[task]))

    def train(self, fleet: Mapping[str, Adapter]) -> bytes:
        """Return the decoder that training ends with, in bfloat16."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            net = flat_cvae.FlatCvae(_longest(fleet), len(fleet), self.channels)
            optimizer = torch.optim.Adam(net.parameters(), lr=_LEARNING_RATE)
            for task, adapter in self._drawn(fleet):
                values, _ = standardised(adapter)
                padded = torch.nn.functional.pad(values, (0, net.length - len(values)))[None]
                loss = flat_cvae.loss_of(padded, *net(padded, _one_hot(task, len(fleet))))
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
        return encode_torch(net.decoder.state_dict(), {}, dtype="bfloat16")

    def _drawn(self, fleet: Mapping[str, Adapter]) -> Iterator[tuple[int, Adapter]]:
        names = list(fleet)
        order: list[int] = []
        for _ in range(self.steps):
            order = order or torch.randperm(len(names)).tolist()
            task = order.pop()
            yield task, fleet[names[task]]

    def _decoder(self, fleet: Mapping[str, Adapter], shared: bytes) -> flat_cvae.Decoder:
        net = flat_cvae.FlatCvae(_longest(fleet), len(fleet), self.channels)
        net.decoder.load_state_dict(decode_torch(shared)[1])
        return net.decoder.eval()


def code_of(adapter: Adapter) -> bytes:
    """Return a task's own bytes: its head, mean and deviation."""
    _, moments = standardised(adapter)
    return Head.of(adapter).to_bytes() + struct.pack("<2f", *moments)


def standardised(adapter: Adapter) -> tuple[torch.Tensor, tuple[float, float]]:
    """Return all values of an adapter in a row, at mean 0 and deviation 1, and what they were."""
    flat = torch.cat([factor.reshape(-1) for module in adapter.modules for factor in (module.a, module.b)])
    mean, deviation = float(flat.mean()), max(float(flat.std()), 1e-12)
    return (flat - mean) / deviation, (mean, deviation)


@torch.no_grad()
def _decode(decoder: flat_cvae.Decoder, task: int, tasks: int, code: bytes) -> Adapter:
    reader = ByteReader(code)
    head = Head.read(reader)
    mean, deviation = struct.unpack("<2f", reader.take(8))
    reader.finish()
    values = decoder(torch.zeros(1, flat_cvae.LATENT), _one_hot(task, tasks))[0] * deviation + mean
    modules, at = [], 0
    for name, rank, inputs, outputs in head.layout:
        a, b = rank * inputs, rank * outputs
        factors = values[at : at + a].reshape(rank, inputs), values[at + a : at + a + b].reshape(outputs, rank)
        modules.append(LoraModule(name, *factors))
        at += a + b
    return head.with_modules(modules)


def _one_hot(task: int, tasks: int) -> torch.Tensor:
    return torch.nn.functional.one_hot(torch.tensor([task]), tasks).float()


def _longest(fleet: Mapping[str, Adapter]) -> int:
    return max(sum(shape.parameters for shape in adapter.layout) for adapter in fleet.values())
