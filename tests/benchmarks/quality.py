"""What a trained store keeps and costs, as one JSON file and one table: `icm eval` and `icm stats` of that store.

    python -m tests.benchmarks.quality NAME [--store FOLDER] [--sources code]  writes tests/benchmarks/results/NAME.json

Losses that the store has already are not measured again; `icm eval --again` measures them anew.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
SOURCES = ("code", "recalled")


def main() -> None:
    """Measure, write the JSON, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name")
    parser.add_argument("--store", default=os.environ.get("ICM_STORE"))
    parser.add_argument("--sources", nargs="+", choices=SOURCES, default=list(SOURCES))
    options = parser.parse_args()
    wanted = [part for source in options.sources for part in ("--source", source)]
    lines = [json.loads(line) for line in _icm(options.store, "eval", "--json", *wanted).splitlines()]
    bill = json.loads(_icm(options.store, "stats", "--json"))
    (fleet,) = bill["fleets"]
    generator = json.loads(_icm(options.store, "show", fleet["tasks"][0]["task"], "--json")).get("generator")
    result = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": {"cores": os.cpu_count(), "processor": platform.machine(), "python": platform.python_version()},
        "icm": _icm(options.store, "--version").strip(),
        "tasks": {line["task"]: line["sources"] for line in lines if line["type"] == "task"},
        "gains": {line["source"]: line for line in lines if line["type"] == "mean"},
        "generator": generator,
        "bill": bill,
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{options.name}.json"
    path.write_text(json.dumps(result, indent=1, sort_keys=True) + "\n")
    print(table(result))


def table(result: dict[str, dict[str, dict[str, dict[str, float]]]]) -> str:
    """Write the losses as a Markdown table: perplexity and bits per byte side by side, then gain and error."""
    measured = [
        source
        for source in ("base", "original", *SOURCES)
        if all(source in found for found in result["tasks"].values())
    ]
    made = [source for source in measured if source in SOURCES]
    heading = [f"{source} {unit}" for unit in ("ppl", "bpb") for source in measured]
    heading += [f"{figure} of {source}" for source in made for figure in ("gain", "relative error")]
    lines = ["| " + " | ".join(["task", *heading]) + " |", "|---|" + "--:|" * len(heading)]
    for task, found in sorted(result["tasks"].items()):
        cells = [f"{found[source]['perplexity']:.2f}" for source in measured]
        cells += [f"{found[source]['bits_per_byte']:.3f}" for source in measured]
        cells += [f"{found[source][figure]:.3f}" for source in made for figure in ("retained_gain", "relative_error")]
        lines.append("| " + " | ".join([task, *cells]) + " |")
    return "\n".join(lines)


def _icm(store: str | None, *arguments: str) -> str:
    environment = os.environ if store is None else os.environ | {"ICM_STORE": store}
    command = [sys.executable, "-c", "from icm_cli.app import main; main()", *arguments]
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    main()
