"""Retained gain against bytes per adapter: the mean of every family; of icm and the best others the worst task too.

    python -m tests.benchmarks.rate_distortion.figure STUDY.json FOLDER

FOLDER gets rate-distortion.svg with all families, and rates.svg, the few that README shows (small_figure.py).
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from tests.benchmarks.rate_distortion.bd_rate import frontier
from tests.benchmarks.rate_distortion.small_figure import DEFAULT, small_figure
from tests.benchmarks.rate_distortion.summary import OURS, STRENGTHENED

COLOURS = ("#0072b2", "#b3530f", "#00795c", "#a3317a", "#c0392b", "#6f42c1", "#7a6a00", "#57606a")
"""Each at least three times as dark as the white ground, which the figure brings along."""
MARKERS = "os^vDPX<>phd*"
_LOWEST_GAIN = 0.5  # below, an adapter has lost half of what it was trained for; curves are cut there


def draw(document: dict[str, Any], folder: Path) -> None:
    """Write both figures; the same study gives the same bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rates.svg").write_text(small_figure(document), encoding="utf-8")
    _draw_all(document, folder / "rate-distortion.svg")


def styles(families: list[str]) -> dict[str, dict[str, Any]]:
    """Return colour, marker and line of each family, no two alike: at full strength, a method is hollow and dashed."""
    methods = list(dict.fromkeys(family.removesuffix(STRENGTHENED) for family in families))
    found: dict[str, dict[str, Any]] = {}
    for family in families:
        number = methods.index(family.removesuffix(STRENGTHENED))
        found[family] = {
            "color": COLOURS[number % len(COLOURS)],
            "marker": MARKERS[number % len(MARKERS)],
            "linestyle": "--" if family.endswith(STRENGTHENED) else "-",
            "markerfacecolor": "white" if family.endswith(STRENGTHENED) else COLOURS[number % len(COLOURS)],
        }
    return found


def _draw_all(document: dict[str, Any], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("agg")
    mpl.rcParams["svg.hashsalt"] = "icm"
    from matplotlib import pyplot

    families = _families(document["points"])
    ours = families.pop(OURS, [])
    others = [point for points in families.values() for point in points]
    figure, axes = pyplot.subplots(figsize=(9.8, 5.6), layout="constrained")
    axes.plot(*_curve(ours, "gain"), marker="o", markersize=5, color="black", linewidth=2.8, zorder=3, label=OURS)
    default = [point for point in ours if point["name"] == document.get("default")]
    axes.plot(*_curve(default, "gain"), "o", markersize=11, color="black", label=DEFAULT if default else None)
    axes.plot(*_curve(ours, "worst"), linestyle=":", color="black", linewidth=1.8, label=f"{OURS}, worst task")
    for family, style in styles(list(families)).items():
        shares, gains = _curve(families[family], "gain")
        label = family if max(gains, default=0.0) >= _LOWEST_GAIN else f"{family} (below {_LOWEST_GAIN})"
        axes.plot(shares, gains, markersize=5, linewidth=1.2, label=label, **style)
    axes.plot(*_curve(others, "worst"), linestyle=":", color="#6e7781", linewidth=1.8, label="best other, worst task")
    has_shares(axes)
    axes.set_xlabel("bytes per adapter, all counted, in % of bf16")
    axes.set_ylabel("retained gain")
    axes.set_ylim(_LOWEST_GAIN, 1.03)
    axes.set_title(f"{document['tasks']} adapters", fontsize="medium")
    figure.legend(fontsize="small", loc="outside right upper", frameon=False)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def has_shares(axes: Any) -> None:
    """Let the axis from left to right be the logarithm of shares in per cent."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g} %")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(visible=True, which="both", alpha=0.2)


def _families(points: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Return the points by family, in alphabetical order."""
    found: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
    for point in sorted(points, key=lambda point: str(point["family"]).casefold()):
        found[point["family"]].append(point)
    return dict(found)


def _curve(points: list[dict[str, Any]], key: str) -> tuple[list[float], list[float]]:
    curve = frontier((100 * point["share"], point[key]) for point in points if point[key] is not None)
    return [share for share, _ in curve], [gain for _, gain in curve]


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), Path(sys.argv[2]))
