"""One size of the fleet: train the product's generator, then encode tasks that it saw and tasks that it did not.

    python -m tests.benchmarks.growth.study SETTING STATISTICS FLEET

Prints one JSON object. A process of its own for each size, so that its peak memory is that size's.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import load_file

from icmlora.adapter.metrics import squared_error
from icmlora.generator.codec.codec import Codec
from icmlora.generator.codec.encoding import encode_adapter
from icmlora.generator.config import config_for
from icmlora.generator.files.network_file import generator_to_bytes
from icmlora.training.config import TrainConfig, steps_for
from icmlora.training.initialisation import fresh_network
from icmlora.training.loop import fit
from icmlora.training.source import AdapterSource
from icmlora.training.state import new_state
from tests.benchmarks.baselines.catalogue import baseline_named
from tests.benchmarks.growth.measured import from_tensors
from tests.benchmarks.growth.real import real_group
from tests.benchmarks.growth.synthetic import UNSEEN, SyntheticAdapterSource
from tests.benchmarks.performance.machine import peak_memory

SAMPLE = 20
"""Tasks that are encoded of either sort."""
STEP_LIMIT = 2_000
"""The product trains fleets of 500 and 1,000 longer; one setting says what that changes."""
ALTERNATIVES = ("bf16", "int8", "svd8-4bit", "svd8-3bit", "svd4-4bit", "svd4-3bit", "svd2-4bit", "svd2-3bit")


@dataclass(frozen=True)
class Setting:
    """What one process measures.

    Attributes:
        tasks: Size of the fleet.
        same_start: Share of tasks with the common initial A; None for the real adapters that were measured.
        width: Of the decoder; None for the one that the quality has.
        quality: Of `icm train`.
        trained: Whether the generator is trained at all; without, only its norm tables know the fleet.
        step_limit: Most steps.
    """

    tasks: int
    same_start: float | None
    width: int | None = None
    quality: int = 4
    trained: bool = True
    step_limit: int = STEP_LIMIT

    @property
    def steps(self) -> int:
        """Return how many steps the product would train for, up to the limit."""
        return min(steps_for(self.tasks), self.step_limit) if self.trained else 0


def measure_setting(setting: Setting, fleet: AdapterSource) -> dict[str, Any]:
    """Train, encode a sample and say what it took."""
    first = fleet.load(0, None)
    sizes = {"tasks": setting.tasks, "quality": setting.quality, "width": setting.width}
    config = config_for(first.base_model, [first.layout], condition_size=0, **sizes)
    wall, cpu = time.perf_counter(), time.process_time()
    net = fresh_network(config, fleet, seed=0)
    if setting.trained:
        for _ in fit(new_state(net, TrainConfig(steps=setting.steps)), fleet):
            pass
    training = {"wall_seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
    data = generator_to_bytes(net)
    peak = peak_memory()
    codec = Codec.of(data)
    seen = range(min(SAMPLE, setting.tasks))  # a fleet begins with all of a smaller one: the same tasks for every size
    unseen = range(UNSEEN, UNSEEN + SAMPLE if setting.same_start is not None else UNSEEN)
    return {
        **asdict(setting),
        "width": config.width,
        "steps": setting.steps,
        "generator_bytes": len(data),
        "training": {key: round(value, 1) for key, value in training.items()},
        "peak_training_bytes": peak,
        "seen": _encode(codec, fleet, seen),
        "unseen": _encode(codec, fleet, unseen),
    }


def measure_alternatives(fleet: SyntheticAdapterSource) -> list[dict[str, Any]]:
    """Encode the unseen sample with methods that store each adapter alone."""
    adapters = [fleet.load(UNSEEN + number, None) for number in range(SAMPLE)]
    found = []
    for name in ALTERNATIVES:
        method = baseline_named(name)
        codes = [method.encode(adapter, b"") for adapter in adapters]
        errors = [
            squared_error(adapter, method.decode(code, b"")) for adapter, code in zip(adapters, codes, strict=True)
        ]
        found.append({"name": name, "code_bytes": _mean(map(len, codes)), "dw_error": round(_mean(errors), 4)})
    return found


def _encode(codec: Codec, fleet: AdapterSource, tasks: Sequence[int]) -> dict[str, float] | None:
    if not tasks:
        return None
    sizes, errors, encoding, decoding = [], [], [], []
    for task in tasks:
        adapter = fleet.load(task, None)
        started = time.process_time()
        encoded = encode_adapter(codec, adapter, {})
        encoding.append(time.process_time() - started)
        started = time.process_time()
        codec.decode(encoded.data)
        decoding.append(time.process_time() - started)
        sizes.append(len(encoded.data))
        errors.append(encoded.squared_error)
    return {
        "code_bytes": _mean(sizes),
        "dw_error": round(_mean(errors), 4),
        "encode_cpu_seconds": round(median(encoding), 3),
        "decode_cpu_seconds": round(median(decoding), 4),
    }


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return round(math.fsum(found) / len(found), 4)


def main() -> None:
    """Measure one setting."""
    torch.set_num_threads(1)
    setting, fleet = Setting(**json.loads(sys.argv[1])), Path(sys.argv[3])
    if setting.same_start is None:
        result = measure_setting(setting, real_group(fleet).fleet())
    else:
        statistics = from_tensors(load_file(Path(sys.argv[2])))
        result = measure_setting(setting, SyntheticAdapterSource(statistics, setting.tasks, setting.same_start))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
