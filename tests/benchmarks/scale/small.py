"""Encode and decode every adapter of a real fleet on one core."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from icmlora.adapter.model import Adapter
from icmlora.generator.codec.codec import Codec
from icmlora.generator.codec.encoding import encode_adapter
from icmlora.generator.config import config_for
from icmlora.generator.files.network_file import generator_to_bytes
from icmlora.generator.initial_a.search import SeedSearch
from icmlora.generator.sensitivity import MeanSquares, sensitivity_of
from icmlora.training.config import TrainConfig
from icmlora.training.initialisation import fresh_network
from icmlora.training.loop import fit
from icmlora.training.state import new_state
from tests.icmlora.small_fleet import MemoryAdapterSource


def trained_codec(adapters: Sequence[Adapter], channels: MeanSquares, steps: int) -> Codec:
    """Train the default generator on a fleet, without task vectors.

    Args:
        adapters: The fleet.
        channels: What `channel_statistics` measured; may be empty.
        steps: Few are enough: they change what decoding gives, not how long it takes.
    """
    fleet = MemoryAdapterSource([[adapter] for adapter in adapters], sets=0)
    config = config_for(adapters[0].base_model, fleet.layouts(), tasks=fleet.tasks(), condition_size=0, quality=4)
    state = new_state(fresh_network(config, fleet, 0, sensitivity_of(config, channels)), TrainConfig(steps=steps))
    for _ in fit(state, fleet):
        pass
    return Codec.of(generator_to_bytes(state.net))


def measure_tasks(codec: Codec, adapters: Mapping[str, Adapter], runs: int) -> list[dict[str, Any]]:
    """Encode each adapter once and decode its code, after one run that is not counted.

    Twice `runs` times: by a codec that has drawn no initial A yet, as when one adapter is asked for, and by one that
    has drawn this one before, as when many are.
    """
    found, seeds = [], SeedSearch()
    for task, adapter in adapters.items():
        started = time.perf_counter()
        initial = seeds.find(adapter)
        data = encode_adapter(codec, adapter, {}, initial).data
        encoding = time.perf_counter() - started
        codec.decode(data)
        firsts = [_timed(Codec(codec.net, codec.digest).decode, data) for _ in range(runs)]
        again = [_timed(codec.decode, data) for _ in range(runs)]
        (wall, cpu), (wall_again, cpu_again) = _sorted_columns(firsts), _sorted_columns(again)
        found.append(
            {
                "task": task,
                "parameters": sum(shape.parameters for shape in adapter.layout),
                "code_bytes": len(data),
                "initial_seed": None if initial is None else initial.seed,
                "encode_seconds": round(encoding, 3),
                "decode_ms": {"least": wall[0], "median": wall[runs // 2]},
                "decode_cpu_ms": {"least": cpu[0], "median": cpu[runs // 2]},
                "decode_again_ms": {"least": wall_again[0], "median": wall_again[runs // 2]},
                "decode_again_cpu_ms": {"least": cpu_again[0], "median": cpu_again[runs // 2]},
            }
        )
    return found


def _sorted_columns(runs: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    wall, cpu = zip(*runs, strict=True)
    return sorted(wall), sorted(cpu)


def _timed(decode: Callable[[bytes], Adapter], data: bytes) -> tuple[float, float]:
    """Return elapsed and processor time in milliseconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    decode(data)
    return round(1000 * (time.perf_counter() - wall), 2), round(1000 * (time.process_time() - cpu), 2)
