"""The paper's flat network on the detection fleet: what its reconstructions of the adapters detect.

usage: python -m tests.benchmarks.detection_fleet.flat_network [--work FOLDER] [--minutes 25] [--out FILE.json]

One convolutional CVAE (tests/benchmarks/rate_distortion/flat_cvae.py) over the flattened adapters of all classes,
all checkpoints, with the settings of the paper's released code: 12 layers, MSE + 0.005 KL, at most 2,000 epochs. It is
trained until the mean loss of an epoch has not fallen by 1 % for 50 epochs, or until the minutes are over.

Each final adapter is then rebuilt from its latent, with its own mean and deviation (the released code takes them from
the adapter that it is to make) and with those of the whole fleet.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from icmlora.adapter.metrics import squared_error
from icmlora.adapter.model import Adapter, LoraModule
from icmlora.formats.discovery.folder import load_adapter
from icmlora.io.tensors import decode_torch, encode_torch
from tests.benchmarks.detection_fleet.held_out import HeldOut, mean_of
from tests.benchmarks.performance.machine import describe_machine
from tests.benchmarks.rate_distortion.cvae_method import standardised
from tests.benchmarks.rate_distortion.flat_cvae import LATENT, FlatCvae, loss_of

RESULT = Path(__file__).parents[1] / "results" / "detection_flat_network.json"
EPOCHS = 2000  # of the paper
_LEARNING_RATE = 1e-3
_PATIENCE, _LEAST_FALL = 50, 0.01


@dataclass
class Trained:
    """A network, and how its training went."""

    net: FlatCvae
    losses: list[float]  # mean of each epoch
    minutes: float

    @property
    def has_stopped_falling(self) -> bool:
        """Whether the last epochs brought nothing."""
        return _has_stopped(self.losses)


def _has_stopped(losses: list[float]) -> bool:
    if len(losses) <= _PATIENCE:
        return False
    return min(losses[-_PATIENCE:]) > (1 - _LEAST_FALL) * min(losses[:-_PATIENCE])


def fleet_of(loras: Path) -> dict[str, list[Adapter]]:
    """Return the adapters of each class, the final one last."""
    found = {}
    for folder in sorted(loras.iterdir()):
        steps = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
        found[folder.name] = [load_adapter(path) for path in (*steps, folder)]
    return found


def train(fleet: Mapping[str, list[Adapter]], minutes: float, seed: int = 0) -> Trained:
    """Train on all adapters, one a step, as its normalisation wants."""
    torch.manual_seed(seed)
    draw = random.Random(seed)
    rows = [(place, standardised(one)[0]) for place, adapters in enumerate(fleet.values()) for one in adapters]
    net = FlatCvae(len(rows[0][1]), len(fleet))
    optimizer = torch.optim.Adam(net.parameters(), lr=_LEARNING_RATE)
    began, losses = time.monotonic(), list[float]()
    while len(losses) < EPOCHS and not _has_stopped(losses) and time.monotonic() - began < 60 * minutes:
        total = 0.0
        for place, values in draw.sample(rows, len(rows)):
            padded = torch.nn.functional.pad(values, (0, net.length - len(values)))[None]
            loss = loss_of(padded, *net(padded, _one_hot(place, len(fleet))))
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            total += loss.item()
        losses.append(total / len(rows))
        if len(losses) % 10 == 1:
            print(f"epoch {len(losses)}: {losses[-1]:.4f}, {(time.monotonic() - began) / 60:.1f} minutes", flush=True)
    return Trained(net, losses, (time.monotonic() - began) / 60)


@torch.no_grad()
def rebuilt(net: FlatCvae, place: int, tasks: int, adapter: Adapter, moments: tuple[float, float]) -> Adapter:
    """Encode an adapter, round its latent to bfloat16, decode it, and give it a mean and a deviation."""
    values, _ = standardised(adapter)
    condition = _one_hot(place, tasks)
    padded = torch.nn.functional.pad(values, (0, net.length - len(values)))[None]
    latent = net.to_mean(torch.cat([net.encoder(padded[:, None]), condition], dim=1)).bfloat16().float()
    decoded = net.decoder(latent, condition)[0, : len(values)] * moments[1] + moments[0]
    modules, at = [], 0
    for module in adapter.modules:
        a, b = module.a.numel(), module.b.numel()
        factors = decoded[at : at + a].reshape(module.a.shape), decoded[at + a : at + a + b].reshape(module.b.shape)
        modules.append(LoraModule(module.name, *factors))
        at += a + b
    return replace(adapter, modules=tuple(modules))


def measured(trained: Trained, fleet: Mapping[str, list[Adapter]], held_out: HeldOut) -> dict[str, Any]:
    """Return figures of each class: with the adapter's own moments, and with the fleet's."""
    decoder = encode_torch(trained.net.decoder.state_dict(), {}, dtype="bfloat16")
    trained.net.decoder.load_state_dict(decode_torch(decoder)[1])
    finals = {task: adapters[-1] for task, adapters in fleet.items()}
    own = {task: standardised(adapter)[1] for task, adapter in finals.items()}
    everything = torch.cat([_values(adapter) for adapter in finals.values()])
    shared = float(everything.mean()), float(everything.std())
    rows: dict[str, Any] = {}
    for place, (task, adapter) in enumerate(finals.items()):
        rows[task] = {}
        for name, moments in (("own moments", own[task]), ("fleet's moments", shared)):
            made = rebuilt(trained.net, place, len(finals), adapter, moments)
            error = squared_error(adapter, made)
            rows[task][name] = held_out.score(task, made) | {"relative_error": error**0.5}
        print(task, rows[task], flush=True)
    kinds = ("own moments", "fleet's moments")
    return {
        "decoder_bytes": len(decoder),
        "latent_bytes": 2 * LATENT,
        "bytes_a_task": len(decoder) / len(finals) + 2 * LATENT,
        "tasks": rows,
        "mean": {kind: mean_of([row[kind] for row in rows.values()]) for kind in kinds},
    }


def _values(adapter: Adapter) -> torch.Tensor:
    return torch.cat([factor.reshape(-1) for module in adapter.modules for factor in (module.a, module.b)])


def _one_hot(place: int, tasks: int) -> torch.Tensor:
    return torch.nn.functional.one_hot(torch.tensor([place]), tasks).float()


def main() -> None:
    """Train, rebuild, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/detection-fleet"))
    parser.add_argument("--minutes", type=float, default=25)
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    fleet = fleet_of(options.work / "loras")
    trained = train(fleet, options.minutes)
    parameters = sum(parameter.numel() for parameter in trained.net.parameters())
    result = {
        "network": "tests/benchmarks/rate_distortion/flat_cvae.py",
        "parameters": parameters,
        "adapters": sum(map(len, fleet.values())),
        "epochs": len(trained.losses),
        "epochs_of_the_paper": EPOCHS,
        "minutes": round(trained.minutes, 1),
        "losses": {str(epoch + 1): round(trained.losses[epoch], 4) for epoch in range(0, len(trained.losses), 10)},
        "last_loss": trained.losses[-1],
        "has_stopped_falling": trained.has_stopped_falling,
        **measured(trained, fleet, HeldOut(options.work)),
        "machine": describe_machine(),
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
