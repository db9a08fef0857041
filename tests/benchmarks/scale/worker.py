"""The 8B adapter in a process of its own, so that its time and peak memory are nobody else's.

    python -m tests.benchmarks.scale.worker encode THREADS FOLDER FLEET
    python -m tests.benchmarks.scale.worker decode THREADS FOLDER RUNS

The first writes a generator and a code, the second reads them. Each prints one JSON object.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from icmlora.generator.codec.codec import Codec
from icmlora.generator.codec.encoding import encode_adapter
from icmlora.generator.files.network_file import generator_to_bytes
from tests.benchmarks.performance.machine import peak_memory
from tests.benchmarks.scale.large import make_adapter, make_network, shapes, spectra_of

_GENERATOR, _CODE = "generator.icmg", "adapter.icmc"


def encode(folder: Path, fleet: Path) -> dict[str, Any]:
    """Make the adapter and its generator, encode it, leave both files."""
    adapter = make_adapter(shapes(), spectra_of(fleet))
    data = generator_to_bytes(make_network(adapter))
    codec = Codec.of(data)
    started, cpu = time.perf_counter(), time.process_time()
    encoded = encode_adapter(codec, adapter, {})
    took = {"seconds": round(time.perf_counter() - started, 2), "cpu_seconds": round(time.process_time() - cpu, 2)}
    (folder / _GENERATOR).write_bytes(data)
    (folder / _CODE).write_bytes(encoded.data)
    sizes = {"generator_bytes": len(data), "code_bytes": len(encoded.data)}
    parameters = sum(shape.parameters for shape in adapter.layout)
    return {
        **took,
        **sizes,
        "parameters": parameters,
        "dw_error": round(encoded.squared_error, 4),
        "peak_bytes": peak_memory(),
    }


def decode(folder: Path, runs: int) -> dict[str, Any]:
    """Open the generator and decode the code, as often as asked; the first run is cold."""
    started = time.perf_counter()
    codec = Codec.of((folder / _GENERATOR).read_bytes())
    opening = time.perf_counter() - started
    data = (folder / _CODE).read_bytes()
    wall, cpu = [], []
    for _ in range(runs):
        started, used = time.perf_counter(), time.process_time()
        codec.decode(data)
        wall.append(round(time.perf_counter() - started, 3))
        cpu.append(round(time.process_time() - used, 3))
    return {"open_seconds": round(opening, 3), "seconds": wall, "cpu_seconds": cpu, "peak_bytes": peak_memory()}


def main() -> None:
    """Do what the command line says."""
    task, threads, folder, last = sys.argv[1:]
    torch.set_num_threads(int(threads))
    print(json.dumps(encode(Path(folder), Path(last)) if task == "encode" else decode(Path(folder), int(last))))


if __name__ == "__main__":
    main()
