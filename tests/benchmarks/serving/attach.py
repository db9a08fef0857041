"""Exchange the adapters of a fleet in a model of this process, and compare with PEFT and the folders.

    python -m tests.benchmarks.serving.attach STORE BASE [--rounds 5] [--out FILE.json]

Each task is attached in turn, several rounds. Measured: processor seconds of an exchange, decoded anew and once more
while it is still in memory, and by turns those of loading the same adapter's folder into a slot with PEFT's own
`hotswap_adapter`, where it takes it; resident memory after each round; and how far the outputs are from those of the
model with the folder. float32, one thread.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from peft import PeftModel
from peft.utils.hotswap import hotswap_adapter
from transformers import AutoModelForCausalLM

from icmlora import Fleet, attach
from icmlora.serving.attach import decoded_last
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
    tasks = [row.name for row in fleet.tasks()]
    torch.set_num_threads(1)
    model: Any = attach(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval(), fleet, tasks[0])
    for task in tasks:
        fleet.materialize(task, work / task)
    swapped = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), work / tasks[0]
    )
    seconds: dict[str, list[float]] = {"decoded": [], "again": [], "hotswap": []}
    memory = []
    for number in range(rounds + 1):  # in the first one the slot gets its modules, and generators are opened
        for task in tasks:
            decoded_last.clear()
            exchange = partial(attach, model, fleet, task)
            took = {"decoded": _timed(exchange), "again": _timed(exchange)}
            with contextlib.suppress(RuntimeError, ValueError):  # PEFT takes those that are like the first one
                took["hotswap"] = _timed(partial(hotswap_adapter, swapped, str(work / task), "default"))
            for way, found in took.items() if number else ():
                seconds[way].append(found)
        memory.append(psutil.Process().memory_info().rss)
    differences = {}
    for task in tasks:
        model = attach(model, fleet, task)
        differences[task] = float((model(TOKENS).logits - _from_folder(base, work / task)).abs().max())
    return {
        "tasks": len(tasks),
        "rounds": rounds,
        "median_processor_seconds": {way: round(statistics.median(found), 4) for way, found in seconds.items()},
        "least_processor_seconds": {way: round(min(found), 4) for way, found in seconds.items()},
        "resident_bytes_after_each_round": memory,
        "tasks_with_equal_logits": sum(difference == 0 for difference in differences.values()),
        "largest_differences_of_logits": {task: found for task, found in differences.items() if found},
    }


def _from_folder(base: Path, folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    logits: torch.Tensor = PeftModel.from_pretrained(model, folder).eval()(TOKENS).logits
    return logits


def _timed(exchange: Callable[[], object]) -> float:
    started = time.process_time()
    exchange()
    return time.process_time() - started


if __name__ == "__main__":
    main()
