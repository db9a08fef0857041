"""What earlier tasks keep while a fleet grows: a table of every task after every update.

    python -m tests.benchmarks.growing --fleet DIR --base DIR [--first 20] [--updates 5] [--each 4] [--out FILE.json]

The fleet is a folder of adapters with samples.jsonl and eval.jsonl, such as `make domain-fleet` makes. With a
tasks.json in it they are taken in that order. Originals are evicted after the first training and after each update.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

import torch

from icmlora.fleet.context import Context
from tests.benchmarks.example_fleet.tasks import BASE_MODEL
from tests.benchmarks.growing.study import Growing, Stage
from tests.benchmarks.growing.table import drift, table
from tests.benchmarks.performance.machine import describe_machine


def main(arguments: list[str] | None = None) -> None:
    """Grow the fleet, print the table, write JSON."""
    options = _options(arguments)
    torch.set_num_threads(1)
    folders = _folders(options.fleet)
    ends = [options.first + options.each * number for number in range(options.updates + 1)]
    if len(folders) < ends[-1]:
        raise SystemExit(f"{options.fleet} has {len(folders)} adapters; {ends[-1]} are needed")
    later = [folders[begin:end] for begin, end in pairwise(ends)]
    stages: list[Stage] = []
    with tempfile.TemporaryDirectory(prefix="growing-") as work:
        dtype = getattr(torch, options.dtype)
        growing = Growing(Context(Path(work) / "store"), BASE_MODEL, options.base, options.texts, 128, dtype)
        for stage in growing.run(folders[: options.first], later):
            stages.append(stage)
            mean = sum(stage.gains.values()) / len(stage.gains)
            print(f"{len(stage.gains)} tasks, {stage.seconds:.0f} s, mean gain {mean:.4f}", flush=True)
    print(table(stages))
    if options.out is not None:
        settings = {"texts": options.texts, "max_tokens": 128, "dtype": options.dtype}
        document = {"machine": describe_machine(), "settings": settings, "largest_drift": drift(stages)}
        document["stages"] = [asdict(stage) for stage in stages]
        options.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def _folders(fleet: Path) -> list[Path]:
    index = fleet / "tasks.json"
    names = (
        [row["name"] for row in json.loads(index.read_text("utf-8"))]
        if index.exists()
        else sorted(path.name for path in fleet.iterdir())
    )
    return [fleet / name for name in names if (fleet / name / "adapter_config.json").exists()]


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="growing", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--fleet", type=Path, required=True, help="folder of adapters")
    parser.add_argument("--base", type=Path, required=True, help="folder of their base model")
    parser.add_argument("--first", type=int, default=20, help="tasks of the first training (default 20)")
    parser.add_argument("--updates", type=int, default=5, help="updates after it (default 5)")
    parser.add_argument("--each", type=int, default=4, help="tasks of each update (default 4)")
    parser.add_argument("--texts", type=int, default=4, help="held-out texts of each task (default 4)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the base model")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
