"""Retained gain against bytes per adapter: the mean of every family; of icm and the best others the worst task too.

python -m tests.benchmarks.rate_distortion.figure STUDY.json FIGURE.svg
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from tests.benchmarks.rate_distortion.bd_rate import frontier
from tests.benchmarks.rate_distortion.summary import OURS

_MARKERS = "os^vDPX*<>"
_LOWEST_GAIN = 0.5  # below, an adapter has lost half of what it was trained for; curves are cut there


def draw(document: dict[str, Any], path: Path) -> None:
    """Write the figure; the same study gives the same bytes."""
    import matplotlib as mpl

    mpl.use("agg")
    mpl.rcParams["svg.hashsalt"] = "icm"
    from matplotlib import pyplot
    from matplotlib.ticker import LogLocator, NullFormatter

    figure, axes = pyplot.subplots(figsize=(9, 5.6), layout="constrained")
    families = _families(document["points"])
    for number, (family, points) in enumerate(families.items()):
        style: dict[str, Any] = {
            "color": "black" if family == OURS else f"C{number % 10}",
            "linewidth": 2.6 if family == OURS else 1.2,
        }
        marker = _MARKERS[(number + number // 10) % len(_MARKERS)]  # no colour twice with the same marker
        axes.plot(*_curve(points, "gain"), marker=marker, markersize=4, label=family, **style)
    ours = families.pop(OURS, [])
    others = [point for points in families.values() for point in points]
    for label, points, colour in ((OURS, ours, "black"), ("best of the others", others, "C3")):
        axes.plot(*_curve(points, "worst"), linestyle="--", color=colour, label=f"{label}, worst task")
    axes.set_xscale("log")
    axes.set_xlabel("bytes per adapter, all counted, in % of bf16")
    axes.set_ylabel("retained gain: mean solid, worst task dashed")
    axes.set_ylim(_LOWEST_GAIN, 1.03)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g} %")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(visible=True, which="both", alpha=0.2)
    axes.legend(fontsize="small", loc="lower right")
    axes.set_title(f"{document['tasks']} adapters", fontsize="medium")
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def _families(points: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Return the points by family, icm first so that it lies below nothing in the legend."""
    found: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
    for point in sorted(points, key=lambda point: point["family"] != OURS):
        found[point["family"]].append(point)
    return dict(found)


def _curve(points: list[dict[str, Any]], key: str) -> tuple[list[float], list[float]]:
    curve = frontier((100 * point["share"], point[key]) for point in points)
    return [share for share, _ in curve], [gain for _, gain in curve]


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), Path(sys.argv[2]))
