"""What the codes of adapters as people train them keep, against their bytes, on each base model.

python -m tests.benchmarks.realistic_fleet.figure FIGURE.svg KEPT.json STUDY.json...

KEPT.json is what `tests.benchmarks.kept_effect` made of the stores at several qualities, and each STUDY.json what
`tests.benchmarks.rate_distortion` made of those of one base model.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from icmlora.generator.config import keep_of
from tests.benchmarks.rate_distortion.figure import COLOURS, has_shares
from tests.benchmarks.rate_distortion.summary import OURS, REFINED
from tests.benchmarks.realistic_fleet.stores import is_share
from tests.benchmarks.realistic_fleet.tasks import GEMMA, SMOLLM2, TASKS

_NAMES = {SMOLLM2: "SmolLM2 135M", GEMMA: "Gemma 3 270M"}
_COLOURS = dict(zip(_NAMES.values(), COLOURS, strict=False))


@dataclass(frozen=True)
class Spot:
    """All tasks of a base model at one quality."""

    share: float  # bytes of one more task, of bf16
    kept: float  # of the effect on other text, mean
    gain: float  # mean
    worst: float  # the lowest gain


def curves(kept: Sequence[Mapping[str, Any]], studies: Iterable[Mapping[str, Any]]) -> dict[str, list[Spot]]:
    """Return what is kept at each quality on each base model, from the smallest codes on."""
    found = {}
    for study in studies:
        points = [point for point in study["points"] if point["family"] == OURS and point["name"].startswith(REFINED)]
        tasks, spots = {row["task"] for row in points[0]["by_task"]}, []
        for point in sorted(points, key=lambda point: float(point["marginal_share"])):
            asked = _share(point["name"].removeprefix(REFINED))
            shares = [row["on_other_text"] for row in kept if row["task"] in tasks and row["asked"] == asked]
            spots.append(Spot(point["marginal_share"], mean(shares), point["gain"], point["worst"]))
        (base_model,) = {task.base_model for task in TASKS if task.name in tasks}
        found[_NAMES[base_model]] = spots
    return found


def _share(quality: str) -> float:
    return float(quality) if is_share(quality) else keep_of(int(quality))


def draw(found: Mapping[str, Sequence[Spot]], path: Path) -> None:
    """Write the figure; the same studies give the same bytes."""
    import matplotlib as mpl

    mpl.use("agg")
    mpl.rcParams["svg.hashsalt"] = "icm"
    from matplotlib import pyplot

    figure, (effect, gain) = pyplot.subplots(1, 2, figsize=(9.8, 4.2), layout="constrained", sharex=True)
    for name, spots in found.items():
        shares, style = [100 * spot.share for spot in spots], {"color": _COLOURS[name], "marker": "o", "markersize": 5}
        effect.plot(shares, [spot.kept for spot in spots], label=name, **style)
        gain.plot(shares, [spot.gain for spot in spots], label=name, **style)
        gain.plot(shares, [spot.worst for spot in spots], color=_COLOURS[name], linestyle=":")
    effect.set_title("share of the effect on other text, mean", fontsize="medium")
    gain.set_title("retained gain: mean, and worst task (dotted)", fontsize="medium")
    effect.legend(frameon=False)
    for axes in (effect, gain):
        has_shares(axes)
        axes.set_xlabel("bytes of one more task, in % of bf16")
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def main(figure: str, kept: str, *studies: str) -> None:
    """Draw what the files say."""
    rows = json.loads(Path(kept).read_text(encoding="utf-8"))["tasks"]
    draw(curves(rows, [json.loads(Path(path).read_text(encoding="utf-8")) for path in studies]), Path(figure))


if __name__ == "__main__":
    main(*sys.argv[1:])
