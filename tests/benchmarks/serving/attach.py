"""Exchange the adapters of a fleet in a model of this process, and compare with PEFT and the folders.

    python -m tests.benchmarks.serving.attach STORE BASE [--rounds 5] [--out FILE.json]

Each task is attached in turn, several rounds. Measured: seconds of an exchange, against loading the same adapter's
folder into a slot with PEFT's own `hotswap_adapter`; resident memory after each round; and how far the outputs are
from those of the model with the folder. float32.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import torch
from peft import PeftModel
from peft.utils.hotswap import hotswap_adapter
from transformers import AutoModelForCausalLM

from icmlora import Fleet, attach
from tests.benchmarks.performance.machine import describe_machine

RESULT = Path(__file__).parents[1] / "results" / "attach.json"
TOKENS = torch.arange(1, 65)[None]


def main() -> None:
    """Measure, print, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path)
    parser.add_argument("base", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="attach-") as folder:
        found = measure(Fleet(options.store), options.base, options.rounds, Path(folder))
    document = {"date": datetime.now(UTC).date().isoformat(), "machine": describe_machine(), **found}
    options.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(document, indent=1))


@torch.no_grad()
def measure(fleet: Fleet, base: Path, rounds: int, work: Path) -> dict[str, Any]:
    """Attach every task several times."""
    tasks = fleet.task_names()
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    seconds, memory = [], []
    for _ in range(rounds):
        for task in tasks:
            started = time.perf_counter()
            model = attach(model, fleet, task)
            seconds.append(time.perf_counter() - started)
        memory.append(psutil.Process().memory_info().rss)
    differences = {}
    for task in tasks:
        model = attach(model, fleet, task)
        differences[task] = float((model(TOKENS).logits - _from_folder(fleet, base, task, work)).abs().max())
    return {
        "tasks": len(tasks),
        "rounds": rounds,
        "median_seconds": round(statistics.median(seconds[len(tasks) :]), 4),
        "peft_hotswap_median_seconds": round(statistics.median(_hotswaps(fleet, base, work)), 4),
        "resident_bytes_after_each_round": memory,
        "tasks_with_equal_logits": sum(difference == 0 for difference in differences.values()),
        "largest_differences_of_logits": {task: found for task, found in differences.items() if found},
    }


def _from_folder(fleet: Fleet, base: Path, task: str, work: Path) -> torch.Tensor:
    if not (work / task).is_dir():
        fleet.materialize(task, work / task)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    logits: torch.Tensor = PeftModel.from_pretrained(model, work / task).eval()(TOKENS).logits
    return logits


def _hotswaps(fleet: Fleet, base: Path, work: Path) -> list[float]:
    """Time PEFT's own exchange of folders, of those that it takes: the same scaling and modules as the first."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tasks = fleet.task_names()
    adapted = PeftModel.from_pretrained(model, work / tasks[0])
    seconds = []
    for task in tasks[1:]:
        started = time.perf_counter()
        try:
            hotswap_adapter(adapted, str(work / task), "default")
        except (RuntimeError, ValueError):
            continue
        seconds.append(time.perf_counter() - started)
    return seconds


if __name__ == "__main__":
    main()
