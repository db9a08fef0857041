"""Compare the codes of `icm train --device cuda`, on the stand-in for a card, with those of `--device cpu`.

    python -m tests.benchmarks.device_quality --fleet DIR --base DIR [--tasks NAME ...]

Both train a generator and refine all codes, one with eight adapters a step and a base model in bfloat16, the other with
one and as it suits this processor. All codes are then measured on the CPU in float32, on held-out text. Writes
results/device-quality.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from icmlora import Fleet
from tests.benchmarks.performance.machine import describe_machine

ROOT = Path(__file__).parents[2]
RESULT = Path(__file__).parent / "results" / "device-quality.json"
_ON_CPU = [sys.executable, "-c", "from icm_cli.app import main; main()"]
_ON_CARD = [sys.executable, "-m", "tests.device.card", "icm"]


def main() -> None:
    """Train on both, measure on the CPU, write the JSON."""
    parser = argparse.ArgumentParser(prog="device_quality", description=__doc__)
    parser.add_argument("--fleet", type=Path, required=True, help="folder of adapters with eval.jsonl")
    parser.add_argument("--base", type=Path, required=True, help="folder of their base model")
    parser.add_argument("--tasks", nargs="*", help="names of some of the folders (default: all)")
    options = parser.parse_args()
    names = options.tasks or sorted(path.parent.name for path in options.fleet.glob("*/adapter_config.json"))
    folders = [options.fleet / name for name in names]
    with tempfile.TemporaryDirectory() as work:
        found = {
            device: measured(Path(work) / device, folders, options.base, command, device)
            for device, command in (("cpu", _ON_CPU), ("cuda", _ON_CARD))
        }
    document = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": describe_machine(),
        "note": "cuda: on the stand-in for a card (tests/device)",
        **found,
        "bytes_of_the_card_per_byte_of_the_cpu": round(found["cuda"]["code_bytes"] / found["cpu"]["code_bytes"], 4),
        "mean_gain_of_the_card_less_that_of_the_cpu": round(found["cuda"]["mean_gain"] - found["cpu"]["mean_gain"], 4),
    }
    RESULT.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(document, indent=1))


def measured(store: Path, folders: list[Path], base: Path, command: list[str], device: str) -> dict[str, Any]:
    """Train on a device, and measure codes on the CPU."""
    fleet = Fleet(store)
    fleet.ingest(folders)
    fleet.add_base_model(fleet.base_models()[0].base.name, base)
    line = [*command, "--store", str(store), "train", "--device", device, "--no-eval", "--no-progress"]
    subprocess.run(line, check=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=sys.stderr)
    report = fleet.evaluate(sources=("code",), device="cpu")
    gains = {task.task: task.sources["code"].retained_gain for task in report.done}
    sizes = {row.name: row.code_size for row in fleet.tasks() if row.code_size is not None}
    return {
        "code_bytes": sum(sizes.values()),
        "mean_gain": round(sum(gain or 0.0 for gain in gains.values()) / len(gains), 4),
        "bytes": sizes,
        "gains": {name: None if gain is None else round(gain, 4) for name, gain in gains.items()},
    }


if __name__ == "__main__":
    main()
