"""Bytes per task against the size of the fleet, everything counted.

python -m tests.benchmarks.growth.figure GROWTH.json FIGURE.svg
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from tests.benchmarks.growth.bill import Result, per_task

_REACH = (10, 3000)
_DEFAULT_QUALITY = 4
_FLOOR = 0.8  # of the least; the curves would lie on each other over a whole axis


def draw(document: dict[str, Any], path: Path) -> None:
    """Write the figure; the same study gives the same bytes."""
    import matplotlib as mpl

    mpl.use("agg")
    mpl.rcParams["svg.hashsalt"] = "icm"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.6), layout="constrained")
    results = [result for result in document["settings"] if result["same_start"] is not None]
    results = [
        result for result in results if result["quality"] == _DEFAULT_QUALITY and result["tasks"] in _sizes(results)
    ]
    for number, width in enumerate(sorted({result["width"] for result in results})):
        found = _curve([result for result in results if result["width"] == width and result["trained"]])
        axes.plot(*found, marker="o", markersize=4, color=f"C{number}", label=f"generator of width {width}")
    plain = _curve([result for result in results if not result["trained"]])
    axes.plot(*plain, marker="s", markersize=4, linestyle="--", color="black", label="untrained generator")
    fixed = next(result for result in results if result["tasks"] == min(_sizes(results)) and result["trained"])
    reach = [count for count in (10, 20, 50, 100, 200, 500, 1000, 2000, 3000) if count >= fixed["tasks"]]
    bytes_each = [fixed["generator_bytes"] / count + fixed["unseen"]["code_bytes"] for count in reach]
    axes.plot(reach, bytes_each, linestyle=":", color="C7", label=f"trained on {fixed['tasks']} tasks, never again")
    axes.set_xscale("log")
    axes.set_xlim(*_REACH)
    axes.set_ylim(bottom=_FLOOR * min(bytes_each + plain[1]))
    axes.set_xlabel("tasks in the fleet")
    axes.set_ylabel("bytes per task: generator and codes (axis cut)")
    axes.grid(visible=True, which="both", alpha=0.2)
    axes.legend(fontsize="small")
    axes.set_title(f"synthetic fleet; an adapter in bf16 takes {document['bf16_bytes']:,} bytes", fontsize="medium")
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def _sizes(results: list[Result]) -> set[int]:
    """Return the sizes of the synthetic fleets; the twin of the real one is none of them."""
    return {result["tasks"] for result in results if result["same_start"] < 1.0}


def _curve(results: list[Result]) -> tuple[list[int], list[float]]:
    shortest = {result["tasks"]: result for result in sorted(results, key=lambda result: -result["steps"])}
    return sorted(shortest), [per_task(shortest[tasks]) for tasks in sorted(shortest)]


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), Path(sys.argv[2]))
