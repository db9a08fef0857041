"""Measure what codes keep of the detection fleet: the user's lines, and mAP50, mAP75 and bytes of each task.

usage: python -m tests.benchmarks.detection_fleet.study [--work FOLDER] [--steps N] [--quality N] [--out FILE.json]

Runs `icm base add`, `icm ingest`, `icm train`, `icm materialize`, `icm eval` and `icm recognize` on WORK/loras with a
new store in WORK/store, prints what they print, and writes the figures.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.benchmarks.detection_fleet.nanodet import NAME, PACKAGE
from tests.benchmarks.performance.machine import describe_machine

LOADER = "tests.benchmarks.detection_fleet.loader:load"
RESULT = Path(__file__).parents[1] / "results" / "detection.json"
SOURCES = ("base", "original", "code")


class Icm:
    """The program, on one store, on the CPU."""

    def __init__(self, store: Path) -> None:
        self._environment = os.environ | {"ICM_STORE": str(store.resolve())}
        self.seconds: dict[str, float] = {}

    def __call__(self, *words: object, fails: bool = False) -> str:
        """Run a command, print it with its output and return what it wrote to stdout."""
        line = [str(word) for word in words]
        print("$ icm", *line, flush=True)
        began = time.monotonic()
        command = [str(Path(sys.executable).with_name("icm")), *line]
        done = subprocess.run(command, check=not fails, text=True, stdout=subprocess.PIPE, env=self._environment)
        self.seconds[" ".join(line[:2])] = round(time.monotonic() - began, 1)
        print(done.stdout, flush=True)
        return done.stdout


def measured(icm: Icm) -> dict[str, Any]:
    """Return for each task mAP50 and mAP75 of all sources, the gain that the code keeps, and bytes."""
    lines = [json.loads(line) for line in icm("eval", "--rung", "code", "--device", "cpu", "--json").splitlines()]
    sizes = {task["name"]: task for task in json.loads(icm("ls", "--json"))}
    found = {}
    for task in lines:
        if "rungs" not in task:
            continue
        row: dict[str, Any] = {
            source: {"mAP50": score["value"], "mAP75": score["mAP75"]}
            for source, score in task["rungs"].items()
            if source in SOURCES
        }
        row["retained_gain"] = task["rungs"]["code"]["retained_gain"]
        size = sizes[task["task"]]
        row |= {"rank": size["rank"], "code_bytes": size["code_size"], "bf16_bytes": 2 * size["parameters"]}
        row |= {"relative_error": size["relative_error"]}
        found[task["task"]] = row
    return found


def recognised(icm: Icm, loras: Path) -> dict[str, Any]:
    """Return which task the held-out images of each task are taken for."""
    found = {}
    for folder in sorted(loras.iterdir()):
        out = icm("recognize", "--samples", folder / "eval.jsonl", "--device", "cpu", "--json", fails=True)
        report = json.loads(out) if out else {}
        found[folder.name] = {name: report.get(name) for name in ("task", "new", "samples_count")}
        found[folder.name]["candidates"] = report.get("candidates", [])[:3]
    return found


def main() -> None:
    """Run the lines, write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/detection-fleet"))
    parser.add_argument("--steps", help="steps of `icm train`")
    parser.add_argument("--quality", default="4", help="of `icm train`")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    os.environ.setdefault("PYTHONPATH", str(Path.cwd()))
    shutil.rmtree(options.work / "store", ignore_errors=True)
    shutil.rmtree(options.work / "out", ignore_errors=True)
    icm, loras = Icm(options.work / "store"), options.work / "loras"
    first = min(folder.name for folder in loras.iterdir())
    icm("base", "add", NAME, options.work / "base", "--loader", LOADER)
    icm("ingest", loras, "--device", "cpu")
    icm(
        "train",
        "--no-eval", "--refine", "0",
        "--device",
        "cpu",
        "--quality",
        options.quality,
        *(["--steps", options.steps] if options.steps else []),
    )
    icm("materialize", first, "-o", options.work / "out", "--source", "code")
    tasks = measured(icm)
    result = {
        "base_model": {"name": NAME, "package": "npm:" + "@".join(PACKAGE)},
        "quality": int(options.quality),
        "images": "composed: cut-outs of tuxpaint-stamps-default on photographs of budgie-backgrounds",
        "tasks": tasks,
        "recognised": recognised(icm, loras),
        "generator": json.loads(icm("generators", "--json")),
        "seconds": icm.seconds,
        "machine": describe_machine(),
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
