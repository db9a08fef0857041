"""What listings take in stores of 20 and of 10,000 tasks, before and after: processor time, elapsed time, memory.

    python -m tests.benchmarks.listings --before REVISION [--sizes 20 10000] [--runs 5] [--work DIR] [--out FILE.json]

Each command is a process of its own, from the start of Python to its end, and the revisions take turns. Each revision,
which must have manifests, lists stores that it made itself (`listed_tasks`); `--work` keeps them for the next time. The
least of the runs counts.
Each store has a cache of its own, which is empty before each run of the `first show`.
This module imports nothing large, because the peak memory of a child counts what its parent has when it begins.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).parents[2]
RESULT = Path(__file__).parent / "results" / "listings.json"
_ICM = "from icm_cli.app import main; main()"
_MACHINE = """import json
from tests.benchmarks.performance.machine import describe_machine
print(json.dumps(describe_machine()))
"""
COMMANDS = {
    "ls": ["ls"],
    "ls --json": ["ls", "--json"],
    "ls --limit 20": ["ls", "--limit", "20"],
    "stats": ["stats"],
    "stats --json": ["stats", "--json"],
    "first show": ["show", "task-000003"],
    "show": ["show", "task-000003"],
    "report": ["report", "--force", "-o", os.devnull],
}
Run = tuple[float, float, int]
"""Processor seconds, elapsed seconds, and peak memory in bytes."""


def measure(trees: dict[str, Path], stores: dict[str, Path], commands: list[str], runs: int) -> dict[str, object]:
    """Return command -> revision -> the least that it took, and the ratio of processor times."""
    found: dict[str, object] = {}
    for command in commands:
        taken: dict[str, list[Run]] = {which: [] for which in trees}
        for run in range(runs):
            for which in sorted(trees, reverse=bool(run % 2)):
                page, cache = stores[which].parent / "page.html", stores[which].parent / "cache"
                arguments = [str(page) if word == os.devnull else word for word in COMMANDS[command]]
                if command == "first show":
                    shutil.rmtree(cache, ignore_errors=True)
                taken[which].append(_run(trees[which], ["-c", _ICM, "--store", str(stores[which]), *arguments], cache))
        least = {which: tuple(map(min, zip(*some, strict=True))) for which, some in taken.items()}
        found[command] = {
            **{
                which: {"processor_seconds": round(cpu, 2), "seconds": round(wall, 2), "peak_memory": memory}
                for which, (cpu, wall, memory) in least.items()
            },
            "ratio": round(least["now"][0] / least["before"][0], 3),
        }
        print(json.dumps({command: found[command]}), flush=True)
    return found


def _run(tree: Path, arguments: list[str], cache: Path) -> Run:
    """Run Python with the code of a tree."""
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(cache)}
    started = time.perf_counter()
    command = [sys.executable, *arguments]
    quiet = subprocess.DEVNULL
    with subprocess.Popen(command, cwd=tree, env=environment, stdout=quiet, stderr=quiet) as running:
        _, status, usage = os.wait4(running.pid, 0)
        running.returncode = os.waitstatus_to_exitcode(status)
    if running.returncode:
        sys.exit(f"{arguments[3:]}: exit {running.returncode}")
    return usage.ru_utime + usage.ru_stime, time.perf_counter() - started, usage.ru_maxrss * 1024


def _store(tree: Path, folder: Path, size: int) -> Path:
    if not (folder / "store").exists():
        _run(tree, ["-P", str(ROOT / "tests" / "benchmarks" / "listed_tasks.py"), str(folder), str(size)], folder)
    return folder / "store"


def main() -> None:
    """Measure, print, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", required=True, help="revision to compare with")
    parser.add_argument("--sizes", type=int, nargs="+", default=[20, 10_000], help="numbers of tasks")
    parser.add_argument("--commands", nargs="+", choices=COMMANDS, default=list(COMMANDS), help="which (default all)")
    parser.add_argument("--runs", type=int, default=5, help="how often each command runs (default 5)")
    parser.add_argument("--work", type=Path, help="folder for the stores, which stay there (default a temporary one)")
    parser.add_argument("--out", type=Path, default=RESULT, help="JSON file to write")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="listings-") as folder:
        trees, work = {"now": ROOT, "before": Path(folder) / "before"}, options.work or Path(folder)
        subprocess.run(["git", "-C", ROOT, "worktree", "add", "--detach", trees["before"], options.before], check=True)
        try:
            for tree in trees.values():  # as installed: else each run would compile what it imports
                packages = ("icm_cli", "icmlora", "registry")
                subprocess.run([sys.executable, "-m", "compileall", "-q", *packages], cwd=tree, check=True)
            found = {}
            for size in options.sizes:
                stores = {which: _store(tree, work / f"{which}-{size}", size) for which, tree in trees.items()}
                found[size] = measure(trees, stores, options.commands, options.runs)
        finally:
            subprocess.run(["git", "-C", ROOT, "worktree", "remove", "--force", trees["before"]], check=True)
    machine = json.loads(subprocess.run([sys.executable, "-c", _MACHINE], capture_output=True, check=True).stdout)
    document = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine,
        "before": options.before,
        "runs": options.runs,
        "tasks": found,
    }
    options.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
