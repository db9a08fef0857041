"""What the checks of rows cost: bytes of a task, and processor time of listings, against a revision without them.

    python -m tests.benchmarks.row_checks --before REVISION [--stores DIR ...] [--runs 7] [--out FILE.json]

The stores may be any of schema 8. Of a copy of each database the columns that schema 8 brought are dropped, and both
are compacted. Listings run on stores of 20 and of 2,000 tasks that share one adapter and its code: rows and nothing
else. Each revision makes and lists its own, in turn.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sqlite3
import statistics
import subprocess
import sys
import tempfile
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

from tests.benchmarks.performance.machine import describe_machine

ROOT = Path(__file__).parents[2]
RESULT = Path(__file__).parent / "results" / "row-checks.json"
_NEW = ("crc", "extra_count", "claim")
_MAKE = """import sys
from pathlib import Path
from icm_cli.app import run
from tests.benchmarks.many_tasks import add_rows, build
work = Path(sys.argv[1])
build(work / "one", 0, 1)
for command in (["ingest", str(work / "one"), "--no-vectors"], ["train", "--no-eval", "--refine", "0", "--steps", "1"]):
    assert run(["--store", str(work / "store"), "--quiet", *command]) == 0
add_rows(work / "store", int(sys.argv[2]))
"""
_LIST = "from icm_cli.app import main; main()"


def bytes_of(store: Path) -> dict[str, float]:
    """Return what a task of a store takes, with the checks and without, in bytes of compacted database and files."""
    with tempfile.TemporaryDirectory(prefix="row-checks-") as folder:
        sizes = [_compacted(store / "registry.db", Path(folder) / "copy.db", drop) for drop in ((), _NEW)]
    with closing(sqlite3.connect(f"file:{store / 'registry.db'}?mode=ro", uri=True)) as rows:
        (tasks,) = rows.execute("SELECT count(*) FROM tasks").fetchone()
        originals = "SELECT sum(size) FROM blobs WHERE id IN (SELECT weights_id FROM adapters)"
        (weights,) = rows.execute(originals).fetchone()
        (everything,) = rows.execute("SELECT sum(size) FROM blobs").fetchone()
    files = everything - weights
    return {
        "tasks": tasks,
        "rows_before": round(sizes[1] / tasks, 1),
        "rows": round(sizes[0] / tasks, 1),
        "files_without_originals": round(files / tasks, 1),
        "growth": round((sizes[0] - sizes[1]) / (sizes[1] + files), 5),
    }


def _compacted(database: Path, copy: Path, drop: tuple[str, ...]) -> int:
    shutil.copyfile(database, copy)
    with closing(sqlite3.connect(copy)) as rows:
        tables = [name for (name,) in rows.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        for table in tables:
            for column in [found[1] for found in rows.execute(f"PRAGMA table_info({table})") if found[1] in drop]:
                rows.execute(f"ALTER TABLE {table} DROP COLUMN {column}")
        rows.commit()
        rows.execute("VACUUM")
    return copy.stat().st_size


def listings(trees: dict[str, Path], work: Path, tasks: int, runs: int) -> dict[str, dict[str, object]]:
    """Return the processor seconds of `ls` and `stats` under each revision, and their ratio."""
    for which, tree in trees.items():
        _python(tree, "-c", _MAKE, str(work / f"{which}-{tasks}"), str(tasks))
    found: dict[str, dict[str, object]] = {}
    for command in ("ls", "stats"):
        seconds: dict[str, list[float]] = {which: [] for which in trees}
        for run in range(runs):
            for which in sorted(trees, reverse=bool(run % 2)):
                store = str(work / f"{which}-{tasks}" / "store")
                seconds[which].append(_python(trees[which], "-c", _LIST, "--store", store, command))
        least = {which: min(times) for which, times in seconds.items()}
        middle = {which: statistics.median(times) for which, times in seconds.items()}
        found[command] = {
            **{f"{which}_seconds": [round(one, 2) for one in sorted(times)] for which, times in seconds.items()},
            "ratio_of_least": round(least["now"] / least["before"], 3),
            "ratio_of_medians": round(middle["now"] / middle["before"], 3),
        }
    return found


def _python(tree: Path, *arguments: str) -> float:
    """Run Python with the code of a tree; returns the processor seconds."""
    before, environment = os.times(), {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *arguments], cwd=tree, env=environment, check=True, capture_output=True)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def main() -> None:
    """Measure, print, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", required=True, help="revision without checks")
    parser.add_argument("--stores", type=Path, nargs="*", default=[], help="stores whose bytes are counted")
    parser.add_argument("--runs", type=int, default=7, help="how often each listing runs (default 7)")
    parser.add_argument("--out", type=Path, default=RESULT, help="JSON file to write")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="row-checks-") as folder:
        trees = {"now": ROOT, "before": Path(folder) / "before"}
        subprocess.run(["git", "-C", ROOT, "worktree", "add", "--detach", trees["before"], options.before], check=True)
        try:
            for tree in trees.values():  # as installed: else each run would compile what it imports
                packages = ("icm_cli", "icmlora", "registry")
                subprocess.run([sys.executable, "-m", "compileall", "-q", *packages], cwd=tree, check=True)
            found = {tasks: listings(trees, Path(folder), tasks, options.runs) for tasks in (20, 2_000)}
        finally:
            subprocess.run(["git", "-C", ROOT, "worktree", "remove", "--force", trees["before"]], check=True)
    document = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": describe_machine(),
        "load": round(os.getloadavg()[0], 2),
        "before": options.before,
        "bytes_of_a_task": {store.name: bytes_of(store) for store in options.stores},
        "listings": found,
    }
    options.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
