"""Commands on 10,000 tasks on each pair of database and place of bytes, and on 1,000,000 rows of tasks in PostgreSQL.

    python -m tests.benchmarks.team.listings [--tasks 10000] [--rows 1000000] [--runs 3] [--listed DIR] [--one DIR]
        [--out FILE.json]

The stores are copies of one that `listed_tasks` makes in a folder; --listed and --one are those of earlier runs, of
10,000 tasks and of one. The pairs take turns, each command is a process of its own, and the least of the runs
counts; of the million there is one, without `ls` of all.
Ten tasks of the million have manifests of their own, the others rows alone; all share the files of the first.
Servers run on the same machine, with PostgreSQL's defaults.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tests.benchmarks.team.commands import ROOT, Run, icm, least

RESULT = Path(__file__).parents[1] / "results" / "team-listings.json"
_SERVE = """import json, sys
from pathlib import Path
from tests.benchmarks.team.stores import PAIRS, copy_of, multiply, servers
work, listed, one, tasks, rows = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), *map(int, sys.argv[4:])
with servers(work / "servers") as at:
    made = {pair: copy_of(listed, pair, work / f"pair-{n}", at) for n, pair in enumerate(PAIRS)} if tasks else {}
    if rows:
        made["rows"] = copy_of(one, PAIRS[-1], work / "rows", at)
        multiply(made["rows"], rows)
    print(json.dumps({"made": made, "environment": at.objects.environment}), flush=True)
    sys.stdin.read()
"""
_BUILD = """import sys
from pathlib import Path
from tests.benchmarks.many_tasks import build
build(Path(sys.argv[1]), int(sys.argv[2]), 1)
"""
_MACHINE = """import json
from tests.benchmarks.performance.machine import describe_machine
print(json.dumps(describe_machine()))
"""


def commands(work: Path, name: str, run: int) -> dict[str, list[str]]:
    """Return the commands that are measured; each ingest is of another adapter."""
    adapter = work / "more" / f"{name.replace(' ', '')}-{run}"
    number = 2_000_000 + 10 * run
    subprocess.run([sys.executable, "-c", _BUILD, str(adapter), str(number)], check=True, cwd=ROOT)
    return {
        "ls --limit 20": ["ls", "--limit", "20"],
        "ls": ["ls"],
        "show": ["show", "task-000003"],
        "stats": ["stats"],
        "ingest of one more": ["ingest", str(adapter), "--no-vectors"],
    }


def measure(
    stores: dict[str, str], work: Path, runs: int, environment: dict[str, str], without: str = ""
) -> dict[str, Any]:
    """Return command -> store -> what it took, without one command."""
    taken: dict[str, dict[str, list[Run]]] = {}
    for run in range(runs):
        for name in sorted(stores, reverse=bool(run % 2)):
            cache = work / "caches" / name.replace(" ", "")
            for command, arguments in commands(work, name, run).items():
                if command == without:
                    continue
                took = icm(stores[name], *arguments, cache=cache, environment=environment)
                print(run, name, command, took, flush=True)
                taken.setdefault(command, {}).setdefault(name, []).append(took)
    return {command: {name: least(some) for name, some in of.items()} for command, of in taken.items()}


def main() -> None:
    """Measure, print, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=10_000, help="tasks on each pair (default 10,000; 0: none)")
    parser.add_argument("--rows", type=int, default=1_000_000, help="rows of tasks (default 1,000,000; 0: none)")
    parser.add_argument("--runs", type=int, default=3, help="how often each command runs (default 3)")
    parser.add_argument("--listed", type=Path, help="folder in which `listed_tasks` has made a store of the tasks")
    parser.add_argument("--one", type=Path, help="folder in which `listed_tasks` has made a store of one task")
    parser.add_argument("--out", type=Path, default=RESULT, help="JSON file to write; what is left out stays in it")
    options = parser.parse_args()
    document = json.loads(options.out.read_text("utf-8")) if options.out.exists() else {}
    with tempfile.TemporaryDirectory(prefix="team-") as folder:
        work = Path(folder)
        listed = _listed(options.listed or work / "listed", options.tasks)
        one = _listed(options.one or work / "one", 1)
        arguments = [str(work), str(listed), str(one), str(options.tasks), str(options.rows)]
        with subprocess.Popen(
            [sys.executable, "-c", _SERVE, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        ) as serving:
            assert serving.stdout is not None
            said = json.loads(serving.stdout.readline())
            made, environment = said["made"], said["environment"]
            rows = made.pop("rows", None)
            if made:
                _note(document, f"{options.tasks} tasks", measure(made, work, options.runs, environment), options.runs)
            if rows:
                name = f"{options.rows} rows in postgresql"
                found = measure({"postgresql + s3": rows}, work / "million", 1, environment, without="ls")
                _note(document, name, found, 1)
            serving.communicate()
    machine = json.loads(subprocess.run([sys.executable, "-c", _MACHINE], capture_output=True, check=True).stdout)
    document["machine"] = machine
    options.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def _note(document: dict[str, Any], part: str, found: dict[str, Any], runs: int) -> None:
    """Put figures into the document, each command with its date; those of other commands stay."""
    of = {"date": datetime.now(UTC).date().isoformat(), "runs": runs}
    document[part] = document.get(part, {}) | {command: figures | of for command, figures in found.items()}


def _listed(folder: Path, count: int) -> Path:
    if count and not (folder / "store").exists():
        command = [sys.executable, "-P", "tests/benchmarks/listed_tasks.py", str(folder), str(count)]
        subprocess.run(command, check=True, cwd=ROOT)
    return folder / "store"


if __name__ == "__main__":
    main()
