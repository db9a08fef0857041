"""What refining a task takes and gives, in two revisions: processor time, bytes, and retained gain on held-out text.

    python -m tests.benchmarks.refinement --case before=TREE=STORE --case after=TREE=STORE [--tasks NAME ...]

A case is a name, a checkout, and a store that this checkout trained with `icm train --refine 0 --no-eval`. Tasks are
encoded again, refined as by default and not at all, by each case in turn, each time as a process of one thread on a
copy of the store. `icm eval` then reads the codes back. Writes results/refinement.json.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from tests.benchmarks.performance.machine import describe_machine

RESULT = Path(__file__).parent / "results" / "refinement.json"
TASKS = ("bible-kjv", "chess-pgn", "html", "legal-licences", "sql")
_ICM = [sys.executable, "-c", "from icm_cli.app import main; main()"]


class Case(NamedTuple):
    """A revision, and a store of its own."""

    name: str
    tree: Path
    store: Path

    def run(self, *command: str) -> tuple[list[dict[str, Any]], float]:
        """Run a command; return the lines that it printed, and its processor time in seconds."""
        before, environment = os.times(), {**os.environ, "PYTHONPATH": str(self.tree), "OMP_NUM_THREADS": "1"}
        line = [*_ICM, "--store", str(self.store), "--json", *command]
        done = subprocess.run(line, env=environment, cwd=self.tree, stdout=subprocess.PIPE, text=True, check=True)
        after = os.times()
        used = after.children_user - before.children_user + after.children_system - before.children_system
        return [json.loads(row) for row in done.stdout.splitlines()], used

    def refined(self, task: str) -> dict[str, float]:
        """Encode a task with and without refining, and measure the refined code."""
        _, without = self.run("encode", task, "--again", "--refine", "0", "--device", "cpu")
        (code, *_), seconds = self.run("encode", task, "--again", "--device", "cpu")
        rows, _ = self.run("eval", task, "--source", "code", "--device", "cpu")
        (row,) = (row for row in rows if row["type"] == "task")
        return {
            "seconds": round(seconds, 1),
            "seconds_of_refining": round(seconds - without, 1),
            "bytes": code["size"],
            "gain": round(row["sources"]["code"]["retained_gain"], 4),
        }


def main() -> None:
    """Encode and measure all tasks, and write the JSON."""
    parser = argparse.ArgumentParser(prog="refinement", description=__doc__)
    parser.add_argument("--case", action="append", required=True, metavar="NAME=TREE=STORE")
    parser.add_argument("--tasks", nargs="*", default=TASKS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        cases = [_copied(case, Path(folder)) for case in options.case]
        tasks: dict[str, dict[str, dict[str, float]]] = {}
        for task in options.tasks:
            tasks[task] = {case.name: case.refined(task) for case in cases}
            print(task, json.dumps(tasks[task]), flush=True)
            document = {
                "date": datetime.now(UTC).date().isoformat(),
                "machine": describe_machine(),
                "means": {case.name: _means([row[case.name] for row in tasks.values()]) for case in cases},
                "tasks": tasks,
            }
            RESULT.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")  # what is done is kept
    print(json.dumps(document["means"], indent=1))


def _copied(case: str, folder: Path) -> Case:
    name, tree, store = case.split("=")
    shutil.copytree(store, folder / name)
    return Case(name, Path(tree).resolve(), folder / name)


def _means(rows: list[dict[str, float]]) -> dict[str, float]:
    return {key: round(mean(row[key] for row in rows), 4) for key in rows[0]}


if __name__ == "__main__":
    main()
