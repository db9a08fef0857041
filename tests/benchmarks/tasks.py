"""What one more task costs in a store of 100, 1,000 and 10,000 tasks, and of 100,000 rows: seconds, bytes, memory.

    python -m tests.benchmarks.tasks [--sizes 100 1000 10000] [--rows 100000] [--out FILE.json]

The adapters are tiny (two layers of width 32, rank 4), so that what is measured is icm and not arithmetic. Each command
is a process of its own; its peak memory is what the system says of it. The store of rows holds tasks that share one
adapter's files: what listings read is there, and nothing else. This module imports nothing large, because the peak
memory of a child counts what its parent has when it begins.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

RESULT = Path(__file__).parent / "results" / "tasks.json"
_BUILD = """import sys
from pathlib import Path
from tests.benchmarks.many_tasks import build
build(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
"""
_ROWS = """import sys
from pathlib import Path
from tests.benchmarks.many_tasks import add_rows
add_rows(Path(sys.argv[1]), int(sys.argv[2]))
"""
_MACHINE = """import json
from tests.benchmarks.performance.machine import describe_machine
print(json.dumps(describe_machine()))
"""


def main() -> None:
    """Measure, print, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[100, 1_000, 10_000], help="numbers of tasks")
    parser.add_argument("--rows", type=int, default=100_000, help="number of rows (default 100,000)")
    parser.add_argument("--out", type=Path, default=RESULT, help="JSON file to write")
    options = parser.parse_args()
    found: dict[str, Any] = {}
    for size in options.sizes:
        with tempfile.TemporaryDirectory(prefix="tasks-") as folder:
            found[str(size)] = measure(Path(folder), size)
            print(json.dumps({size: found[str(size)]}), flush=True)
    with tempfile.TemporaryDirectory(prefix="tasks-") as folder:
        found[f"{options.rows} rows"] = measure_rows(Path(folder), options.rows)
        print(json.dumps(found[f"{options.rows} rows"]), flush=True)
    machine = json.loads(subprocess.run([sys.executable, "-c", _MACHINE], capture_output=True, check=True).stdout)
    document = {"date": datetime.now(UTC).date().isoformat(), "machine": machine, "found": found}
    options.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def measure(work: Path, size: int) -> dict[str, Any]:
    """Ingest and train a fleet, list it, and add a task."""
    store = work / "store"
    _python(_BUILD, str(work / "adapters"), "0", str(size))
    ingest = _icm(store, "ingest", str(work / "adapters"), "--no-vectors")
    train = _icm(store, "train", "--no-eval", "--refine", "0", "--json")
    (trained,) = [line for line in map(json.loads, train["output"].splitlines()) if line["type"] == "trained"]
    metrics = trained["metrics"]
    database = (store / "registry.db").stat().st_size
    return {
        "load": round(os.getloadavg()[0], 2),
        "ingest_milliseconds_a_task": round(1e3 * ingest["seconds"] / size, 2),
        "ingest_peak_memory": ingest["peak_memory"],
        "steps": metrics["steps"],
        "step_milliseconds": round(1e3 * metrics["fit_seconds"] / metrics["steps"], 2),
        "encode_milliseconds_a_task": round(1e3 * metrics["encode_seconds"] / size, 2),
        "train_peak_memory": train["peak_memory"],
        "code_bytes_a_task": round(trained["codes_size"] / size, 1),
        "database_bytes_a_task": round(database / size, 1),
        **_listings(work, store, size),
    }


def measure_rows(work: Path, rows: int) -> dict[str, Any]:
    """Fill a store with rows alone, list it, and add a task."""
    store = work / "store"
    _python(_BUILD, str(work / "one"), "0", "1")
    _icm(store, "ingest", str(work / "one"), "--no-vectors")
    _icm(store, "train", "--no-eval", "--refine", "0", "--steps", "1")
    _python(_ROWS, str(store), str(rows))
    found = _listings(work, store, rows)
    return {"database_bytes_a_task": round((store / "registry.db").stat().st_size / rows, 1), **found}


def _listings(work: Path, store: Path, size: int) -> dict[str, Any]:
    _python(_BUILD, str(work / "more"), str(size), "1")
    commands = {
        "ls": ("ls",),
        "ls of 20": ("ls", "--limit", "20"),
        "show": ("show", "task-000000"),
        "stats": ("stats",),
        "ingest of one more": ("ingest", str(work / "more"), "--no-vectors"),
    }
    timed = {name: _icm(store, *command) for name, command in commands.items()}
    return {name: {key: run[key] for key in ("seconds", "peak_memory")} for name, run in timed.items()}


def _icm(store: Path, *arguments: str) -> dict[str, Any]:
    """Run a command; returns its seconds, its peak memory in bytes, and what it printed."""
    command = [sys.executable, "-c", "from icm_cli.app import main; main()", "--store", str(store)]
    started = time.perf_counter()
    command += arguments
    with (
        tempfile.TemporaryFile("w+") as out,
        subprocess.Popen(command, stdout=out, stderr=subprocess.DEVNULL) as running,
    ):
        _, status, usage = os.wait4(running.pid, 0)
        running.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.perf_counter() - started
        out.seek(0)
        if running.returncode:
            sys.exit(f"icm {' '.join(arguments[:2])}: exit {running.returncode}")
        return {"seconds": round(seconds, 2), "peak_memory": usage.ru_maxrss * 1024, "output": out.read()}


def _python(code: str, *arguments: str) -> None:
    subprocess.run([sys.executable, "-c", code, *arguments], check=True)


if __name__ == "__main__":
    main()
