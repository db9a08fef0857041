"""Encoding with refinement on workers: one against two, and what a killed worker costs.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.workers STORE [--tasks 8] [--refine 40] [--runs 3] [--out FILE.json]

STORE has a trained generator and its base model at hand; it is copied, and only the copies are written to. Each run
encodes the same tasks in this order: this process alone, one worker, two workers, two workers of which one is killed in
the middle of a task. So what else the machine does falls on all of them. The cluster is started once and is not part of
the times; starting the workers and loading the base model is, as a user waits for both. The first encoding of all is
left out of the times: it reads the base model's files for the first time.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch

from icmlora import Fleet
from icmlora.fleet.encode import tasks as encoding
from icmlora.fleet.encode.report import TaskEncoded
from icmlora.fleet.encode.search import encode_tasks
from icmlora.fleet.resources.loading import ModelCache
from icmlora.fleet.resources.workers import OnProgress, _cluster
from icmlora.generator.codec.limits import Limits
from registry.manifests import Task
from tests.benchmarks.performance.machine import describe_machine
from tests.shared import paths_of

RESULT = Path(__file__).parent / "results" / "workers.json"
CASES = {"one process": None, "one worker": "1", "two workers": "2", "two workers, one killed": "2"}
_NOTE = "refining, step "


def killed_once(
    models: ModelCache, tasks: Sequence[Task], on_progress: OnProgress, limits: Limits, **options: Any
) -> Iterator[tuple[Task, TaskEncoded]]:
    """Encode as usual; the process is killed in the middle of the first task that is refined, once in each store."""
    killed, half = paths_of(models.store).root.parent / "killed", (limits.refine or 40) // 2

    def note(text: str) -> None:
        on_progress(text)
        if f"{_NOTE}{half} " in text:
            with suppress(FileExistsError):
                killed.touch(exist_ok=False)
                os.kill(os.getpid(), signal.SIGKILL)

    return encode_tasks(models, tasks, note, limits, **options)


def measure(source: Path, tasks: list[str], refine: int, case: str) -> dict[str, Any]:
    """Encode the tasks in a copy of the store; returns the seconds and the digests of the codes."""
    with tempfile.TemporaryDirectory(prefix="workers-") as folder:
        fleet = Fleet(shutil.copytree(source, Path(folder) / "store"))
        work = killed_once if case.endswith("killed") else encode_tasks
        with patch.object(encoding, "encode_tasks", work):
            load, started = os.getloadavg()[0], time.perf_counter()
            report = fleet.encode(tasks, refine=refine, device="cpu", again=True, workers=CASES[case])
            seconds = time.perf_counter() - started
        if (killed := (Path(folder) / "killed").exists()) != case.endswith("killed"):
            raise SystemExit(f"{case}: a worker was {'' if killed else 'not '}killed")
        statuses = {task.status for task in report.done}
        if statuses != {"encoded"}:
            raise SystemExit(f"{case}: {statuses}; {[task.reason for task in report.done if task.reason]}")
        with fleet.context.open(read_only=True) as store:
            codes = [task.code and task.code.blob for task in store.named(tasks)]
        return {"seconds": round(seconds, 2), "load": round(load, 2), "codes": codes}


def summary(runs: list[dict[str, dict[str, Any]]], tasks: int) -> dict[str, Any]:
    """Return medians and the ratios within each run."""
    seconds = {case: [run[case]["seconds"] for run in runs] for case in CASES}
    one, two, killed = (seconds[case] for case in ("one worker", "two workers", "two workers, one killed"))
    return {
        "median_seconds": {case: statistics.median(values) for case, values in seconds.items()},
        "two_over_one": [round(a / b, 3) for a, b in zip(one, two, strict=True)],
        "killed_costs_seconds": [round(b - a, 2) for a, b in zip(two, killed, strict=True)],
        "seconds_per_task_of_one_worker": round(statistics.median(one) / tasks, 2),
        "same_codes": len({json.dumps(run[case]["codes"]) for run in runs for case in CASES}) == 1,
    }


def main() -> None:
    """Measure, print, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path, help="a store with a trained generator")
    parser.add_argument("--tasks", type=int, default=8, help="how many, by name (default 8)")
    parser.add_argument("--refine", type=int, default=40, help="steps of refinement (default 40)")
    parser.add_argument("--runs", type=int, default=3, help="how often each case is measured (default 3)")
    parser.add_argument("--out", type=Path, default=RESULT, help="JSON file to write")
    options = parser.parse_args()
    tasks = [row.name for row in Fleet(options.store).tasks() if row.is_coded][: options.tasks]
    with _cluster("2"):
        measure(options.store, tasks[:1], 1, "one process")
        runs = [
            {case: measure(options.store, tasks, options.refine, case) for case in CASES} for _ in range(options.runs)
        ]
    document = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": describe_machine() | {"ray": version("ray")},
        "tasks": len(tasks),
        "refine": options.refine,
        "summary": summary(runs, len(tasks)),
        "runs": [
            {case: {"seconds": run[case]["seconds"], "load": run[case]["load"]} for case in CASES} for run in runs
        ],
    }
    options.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(document["summary"], indent=1))


if __name__ == "__main__":
    main()
