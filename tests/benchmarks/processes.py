"""Training by one process and by several: seconds of fitting, and bytes of the result.

    python -m tests.benchmarks.processes [--fleet DIR] [--base DIR] [--device cpu] [--processes 1 2] [--runs 1]

Writes tests/benchmarks/results/processes.json. The efficiency is one process's seconds, divided by those of n processes
and by n: 1 is as fast as it gets. It means something only where each process has a core, or a card, of its own, and
the load average before each run says whether it had.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from tests.benchmarks.performance.commands import icm, process
from tests.benchmarks.performance.machine import describe_fleet, describe_machine, weight_files

ROOT = Path(__file__).parents[2]
RESULT = Path(__file__).parent / "results" / "processes.json"


def main() -> None:
    """Measure, print, write the JSON."""
    options = _options()
    os.environ["OMP_NUM_THREADS"] = "1"  # as torchrun sets it
    runs: list[dict[str, Any]] = []
    (ROOT / "build").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=ROOT / "build") as folder:
        filled = Path(folder) / "filled"
        _fill(filled, options.fleet, options.base)
        for number in range(options.runs):
            for count in options.processes:  # in turn, so that what else the machine does meets all alike
                store = Path(shutil.copytree(filled, Path(folder) / f"{number}-{count}"))
                runs.append(measure(store, count, options.device, options.steps))
                print(json.dumps(runs[-1]), flush=True)
    document = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": describe_machine(),
        "fleet": describe_fleet(weight_files(options.fleet)),
        "efficiency": efficiency(runs),
        "runs": runs,
    }
    RESULT.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(document["efficiency"]))


def measure(store: Path, count: int, device: str, steps: int | None) -> dict[str, Any]:
    """Train on a store; returns what it took and gave."""
    options = ["train", "--no-eval", "--refine", "0", "--json", "--device", device]
    options += [] if steps is None else ["--steps", str(steps)]
    script, *rest = icm(*options, store=store)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    load = round(os.getloadavg()[0], 2)
    lines = process([*launcher, script, *rest]).splitlines()
    (trained,) = [line for line in map(json.loads, lines) if line["type"] == "trained"]
    metrics = trained["metrics"]
    return {
        "processes": metrics["processes"],
        "device": metrics["device"],
        "steps": metrics["steps"],
        "load": load,
        "fit_seconds": metrics["fit_seconds"],
        "bits_per_parameter": metrics["bits_per_parameter"],
        "peak_bytes_of_the_first": metrics["peak_memory"],
        "generator_bytes": trained["generator_size"],
        "codes_bytes": trained["codes_size"],
    }


def efficiency(runs: list[dict[str, Any]]) -> dict[str, float]:
    """Return by number of processes how much of their number is gained; 1.0 for one process."""
    seconds = {
        count: median(run["fit_seconds"] for run in runs if run["processes"] == count)
        for count in {run["processes"] for run in runs}
    }
    return {str(count): round(seconds[1] / (took * count), 3) for count, took in sorted(seconds.items())}


def _fill(store: Path, fleet: Path, base: Path | None) -> None:
    process(icm("ingest", str(fleet), "--no-vectors", store=store))
    if base is None:
        return
    (label,) = {json.loads(path.read_bytes())["base_model_name_or_path"] for path in fleet.rglob("adapter_config.json")}
    process(icm("base", "add", label, str(base), store=store))
    process(icm("vectors", store=store))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="processes", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--fleet", type=Path, default=ROOT / "docs" / "example-fleet", help="folder of adapters")
    parser.add_argument("--base", type=Path, help="folder of their base model; without it, no vectors and even weights")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="numbers to compare (default 1 2)")
    parser.add_argument("--runs", type=int, default=1, help="how often each is measured (default 1)")
    parser.add_argument("--steps", type=int, help="steps of training (default: what icm chooses)")
    options = parser.parse_args()
    if 1 not in options.processes:
        parser.error("--processes needs 1, which the others are compared with")
    return options


if __name__ == "__main__":
    main()
