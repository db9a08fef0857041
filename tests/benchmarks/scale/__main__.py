"""Whether encoding and decoding keep their bars: adapters of a fleet on one core, a synthetic 8B adapter on two.

    python -m tests.benchmarks.scale --fleet DIR [--base DIR] [--runs N]

Writes tests/benchmarks/results/scale.json. Elapsed times say what a user waits; processor times say what it would be on
idle cores. With the base model the channels of the fleet's generator have their measured weights, else even ones.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import torch

from icmlora.adapter.model import Adapter
from icmlora.base_models.finding.lookup import find_base_model
from icmlora.base_models.kinds.causal_lm import CausalLM
from icmlora.base_models.reading import EvaluationData
from icmlora.base_models.running.channel_statistics import channel_statistics
from icmlora.formats.discovery.folder import load_adapter
from icmlora.formats.peft.peft import CONFIG_NAME
from icmlora.generator.sensitivity import MeanSquares
from tests.benchmarks.performance.machine import describe_machine
from tests.benchmarks.scale.small import measure_tasks, trained_codec

ROOT = Path(__file__).parents[3]
RESULT = Path(__file__).parents[1] / "results" / "scale.json"
DECODE_MS, ENCODE_SECONDS, LARGE_SECONDS, LARGE_BYTES = 50, 60, 3, 2 * 2**30
"""The bars."""
_STEPS, _TOKENS = 100, 3000


def main() -> None:
    """Measure, print, write the JSON."""
    options = _options()
    with tempfile.TemporaryDirectory() as folder:
        large = {
            "encode": _worker("encode", folder, str(options.fleet)),
            "decode": _worker("decode", folder, str(options.runs)),
        }
    torch.set_num_threads(1)
    adapters = {path.parent.name: load_adapter(path.parent) for path in sorted(options.fleet.glob(f"*/{CONFIG_NAME}"))}
    channels = {} if options.base is None else _channels(options.base, options.fleet, adapters)
    tasks = measure_tasks(trained_codec(list(adapters.values()), channels, _STEPS), adapters, options.runs)
    document = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": describe_machine(),
        "bars": {
            "decode_ms": DECODE_MS,
            "encode_seconds": ENCODE_SECONDS,
            "large_decode_seconds": LARGE_SECONDS,
            "large_peak_bytes": LARGE_BYTES,
        },
        "fleet": {"threads": 1, "channel_weights": bool(channels), **_summary(tasks), "tasks": tasks},
        "large": {"threads": 2, **large},
    }
    RESULT.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({"fleet": _summary(tasks), "large": large}, indent=1))


def _summary(tasks: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the middle and the slowest task, each by the least and the median of its runs."""
    rows: dict[str, Any] = {}
    for name in ("decode_ms", "decode_cpu_ms", "decode_again_ms", "decode_again_cpu_ms"):
        for run in ("least", "median"):
            values = [task[name][run] for task in tasks]
            rows[f"{name}_{run}"] = {"p50": round(median(values), 2), "max": max(values)}
    return {**rows, "encode_seconds_max": max(task["encode_seconds"] for task in tasks)}


def _worker(task: str, folder: str, last: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.benchmarks.scale.worker", task, "2", folder, last]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        sys.exit(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def _channels(base: Path, fleet: Path, adapters: dict[str, Adapter]) -> MeanSquares:
    """Measure the base model's channels on one held-out text of each task that has any."""
    label = next(iter(adapters.values())).base_model
    model = CausalLM().load(find_base_model(label, aliases={label: base}))
    files = [fleet / task / "eval.jsonl" for task in adapters]
    samples = [EvaluationData.parse(path.read_bytes(), path=path).examples[0] for path in files if path.exists()]
    names = {shape.module for adapter in adapters.values() for shape in adapter.layout}
    return channel_statistics(model, samples, sorted(names), max_tokens=_TOKENS)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scale", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--fleet", type=Path, required=True, help="folder of adapters, one of rank 16 at least")
    parser.add_argument("--base", type=Path, help="folder of their base model")
    parser.add_argument("--runs", type=int, default=9, help="how often each code is decoded (default 9)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
