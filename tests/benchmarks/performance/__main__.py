"""What icm costs in time and memory, measured on this machine.

    python -m tests.benchmarks.performance [--fleet DIR] [--base DIR | --store DIR] [--runs N]
    python -m tests.benchmarks.performance --train --fleet DIR --base DIR

The first prints a table and writes tests/benchmarks/results/performance.json. Writing adapters from codes needs a
trained store: --store copies one that is there, --base trains a throw-away one of 20 steps. With --train the main
training itself is measured too; without it, what the file has of an earlier training of the same fleet stays.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from icmlora.fleet.write.sources import Source
from tests.benchmarks.performance.commands import icm, measure_materialize, measure_short_commands, process
from tests.benchmarks.performance.figures import Figure, table
from tests.benchmarks.performance.ingest import measure_ingest
from tests.benchmarks.performance.machine import describe_fleet, describe_machine, weight_files
from tests.benchmarks.performance.training import measure_training

ROOT = Path(__file__).parents[3]
RESULT = Path(__file__).parents[1] / "results" / "performance.json"


def main() -> None:
    """Measure, print the table, write the JSON."""
    options = _options()
    fleet = describe_fleet(weight_files(options.fleet))
    sections: dict[str, dict[str, Any]] = _earlier(fleet)
    (ROOT / "build").mkdir(exist_ok=True)
    # Beside the repository's other products, not in /tmp: that may be memory, where syncing costs nothing.
    with tempfile.TemporaryDirectory(dir=ROOT / "build") as folder:
        work = Path(folder)
        store = work / "store"
        if options.train:
            sections["training"] = _section(measure_training(options.fleet, options.base, store, []))
        sections["speed"] = _section(_measure_speed(options, store, work))
    figures = [Figure(**figure) for section in sections.values() for figure in section["figures"]]
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps({"fleet": fleet, **sections}, indent=1) + "\n", encoding="utf-8")
    print(table(figures))


def _measure_speed(options: argparse.Namespace, store: Path, work: Path) -> list[Figure]:
    sources: list[Source] = ["original", "code", "generate"]
    if options.store is not None:
        shutil.copytree(options.store, store)
    elif options.base is not None and not store.exists():
        measure_training(options.fleet, options.base, store, ["--steps", "20"])
    elif not store.exists():
        process(icm("ingest", str(options.fleet), "--no-vectors", store=store))
        sources = ["original"]
    return [
        *measure_ingest(options.fleet, work, options.runs),
        *measure_short_commands(store, options.runs),
        *measure_materialize(store, options.fleet, work, sources, options.runs),
    ]


def _section(figures: Sequence[Figure]) -> dict[str, Any]:
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": describe_machine(),
        "figures": [asdict(figure) for figure in figures],
    }


def _earlier(fleet: str) -> dict[str, dict[str, Any]]:
    """Return the training that the file has, if it was of this fleet."""
    if not RESULT.exists():
        return {}
    result = json.loads(RESULT.read_text(encoding="utf-8"))
    return {"training": result["training"]} if result["fleet"] == fleet and "training" in result else {}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fleet", type=Path, default=ROOT / "docs" / "example-fleet", help="folder of adapters")
    parser.add_argument("--base", type=Path, help="folder of their base model")
    parser.add_argument("--store", type=Path, help="a store that was trained on the fleet; it is copied")
    parser.add_argument("--runs", type=int, default=7, help="how often each case is measured (default 7)")
    parser.add_argument("--train", action="store_true", help="measure the main training; minutes")
    options = parser.parse_args()
    if options.train and (options.base is None or options.store is not None):
        parser.error("--train needs --base and makes its own store")
    return options


if __name__ == "__main__":
    main()
