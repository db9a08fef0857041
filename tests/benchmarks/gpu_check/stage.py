"""One stage in a process of its own, so that its time and peak memory are nobody else's.

    python -m tests.benchmarks.gpu_check.stage STAGE DEVICE STORE OPTIONS

OPTIONS is a JSON object of keyword arguments. It prints one JSON object. Loading the base model and everything else
before the first task counts in `seconds`, not in `seconds_each`.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from icmlora import Fleet
from icmlora.fleet.context import Event
from icmlora.fleet.encode.report import TaskEncoded
from icmlora.fleet.measure.report import TaskEvaluated
from icmlora.fleet.train.report import EpisodeDone, StepDone
from icmlora.fleet.vectors.vectors import VectorsExtracted
from icmlora.io.devices import resolve_device
from tests.benchmarks.performance.machine import peak_memory

_UNITS = (VectorsExtracted, StepDone, TaskEncoded, EpisodeDone, TaskEvaluated)
"""Events after each of which one unit of work is done."""
_DECODES = 5


class Clock:
    """Notes when each unit of work was done."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def listen(self, event: Event) -> None:
        """Take an event of a use case."""
        if isinstance(event, _UNITS):
            self.times.append(time.perf_counter())

    def each(self) -> float | None:
        """Return the median of the seconds between one unit and the next, None of fewer than two."""
        gaps = [later - earlier for earlier, later in zip(self.times, self.times[1:], strict=False)]
        return round(median(gaps), 4) if gaps else None


def vectors(fleet: Fleet, device: str) -> dict[str, Any]:
    """Extract the vectors of all tasks."""
    fleet.extract_vectors(device=device, again=True)
    return {}


def train(fleet: Fleet, device: str, steps: int) -> dict[str, Any]:
    """Train a generator."""
    (trained,) = fleet.train(device=device, steps=steps, fresh=True, refine=0, evaluate=False).trained
    return {"generator_bytes": trained.generator_size, "codes_bytes": trained.codes_size}


def encode(fleet: Fleet, device: str, refine: int) -> dict[str, Any]:
    """Encode all tasks again, with refinement."""
    report = fleet.encode(device=device, refine=refine, quality=4, again=True)
    wrong = [f"{task.task}: {task.reason}" for task in report.done if task.status != "encoded" or task.reason]
    if wrong:
        raise SystemExit(str(wrong))
    return {"code_bytes": [task.size for task in report.done]}


def few_shot(fleet: Fleet, device: str, episodes: int) -> dict[str, Any]:
    """Train a few-shot start."""
    fleet.train_few_shot(device=device, episodes=episodes)
    return {}


def generate(fleet: Fleet, device: str, samples: str) -> dict[str, Any]:
    """Generate an adapter for a new task."""
    made = fleet.generate("new", samples, Path(samples).with_name("generated"), device=device, force=True)
    return {"samples": made.samples, "rank": made.rank}


def evaluate(fleet: Fleet, device: str, tasks: Sequence[str]) -> dict[str, Any]:
    """Measure originals and codes."""
    report = fleet.evaluate(tasks, sources=("original", "code"), device=device, again=True)
    losses = {f"{task.task}/{name}": one.score.value for task in report.done for name, one in task.sources.items()}
    return {"losses": losses}


def decode(fleet: Fleet, device: str, tasks: Sequence[str]) -> dict[str, Any]:
    """Decode one code several times, then several to the device; codes are decoded on the CPU whatever it is."""
    fleet.load(tasks[0], source="code")  # imports, opens the generator
    times = []
    for _ in range(_DECODES):
        started = time.perf_counter()
        fleet.load(tasks[0], source="code")
        times.append(round(time.perf_counter() - started, 4))
    started = time.perf_counter()
    loaded = list(fleet.load_many(tasks, source="code", device=device))
    seconds = round(time.perf_counter() - started, 4)
    digest = hashlib.sha256()
    for name, adapter in loaded:
        for module in adapter.modules:
            factors = [factor.cpu().numpy().tobytes() for factor in (module.a, module.b)]
            digest.update(f"{name} {module.name}".encode() + b"".join(factors))
    return {"decode_seconds": times, "to_device_seconds": seconds, "digest": digest.hexdigest()}


STAGES: dict[str, Callable[..., dict[str, Any]]] = {
    "vectors": vectors,
    "train": train,
    "encode": encode,
    "few_shot": few_shot,
    "generate": generate,
    "evaluate": evaluate,
    "decode": decode,
}


def main() -> None:
    """Run one stage and print what it took."""
    stage, device, store, options = sys.argv[1:]
    clock = Clock()
    fleet = Fleet(store, on_event=clock.listen)
    started = time.perf_counter()
    found = STAGES[stage](fleet, device, **json.loads(options))
    seconds = round(time.perf_counter() - started, 2)
    took: dict[str, Any] = {"seconds": seconds, "seconds_each": clock.each(), "host_bytes": peak_memory()}
    if resolve_device(device).type == "cuda":
        took["card"] = torch.cuda.get_device_name(device)
        took["device_bytes"] = torch.cuda.max_memory_allocated()
    print(json.dumps({**took, **found}))


if __name__ == "__main__":
    main()
