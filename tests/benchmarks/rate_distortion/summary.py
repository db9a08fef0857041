"""A point in one line: bytes of the fleet, of one adapter and of one more task; mean and worst of what is kept."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from tests.benchmarks.rate_distortion.bd_rate import Curve, bd_rate, envelope, frontier
from tests.benchmarks.rate_distortion.study import PointResult

OURS = "icm"
REFINED = "refined-"
"""How the names of icm's points, and of their stores, begin whose codes were refined on the tasks' samples."""
HIGH = (0.95, 0.9)
"""Mean and worst gain from which on an adapter still does nearly all of its job."""
STRENGTHENED = ", full strength"
"""How the families end that have icm's correction of a quantiser's scale, which no publication has."""


@dataclass(frozen=True)
class PointSummary:
    """Figures of one point.

    Attributes:
        total: Bytes of the fleet: what is shared and every task.
        per_adapter: `total` divided by the tasks.
        marginal: Mean bytes of one more task.
        share: `total` in terms of the fleet's bf16 bytes.
        marginal_share: Mean bytes of one more task in terms of a mean adapter's bf16 bytes.
        dw_error: Mean squared error.
        gain: Mean retained gain.
        worst: Smallest retained gain.
        worst_task: Whose it is.
    """

    family: str
    name: str
    tasks: int
    total: int
    per_adapter: float
    marginal: float
    share: float
    marginal_share: float
    dw_error: float
    gain: float
    worst: float
    worst_task: str


def summarise(result: PointResult) -> PointSummary:
    """Sum up a point; tasks whose original has no gain count for bytes and error only."""
    own, count = sum(task.size for task in result.tasks), len(result.tasks)
    bf16 = sum(task.bf16_size for task in result.tasks)
    total = result.shared + own
    gains = [(task.retained_gain, task.task) for task in result.tasks if task.retained_gain is not None]
    worst, worst_task = min(gains, default=(math.nan, ""))
    return PointSummary(
        family=result.family,
        name=result.name,
        tasks=count,
        total=total,
        per_adapter=total / count,
        marginal=own / count,
        share=total / bf16,
        marginal_share=own / bf16,
        dw_error=math.fsum(task.dw_error for task in result.tasks) / count,
        gain=math.fsum(gain for gain, _ in gains) / len(gains) if gains else math.nan,
        worst=worst,
        worst_task=worst_task,
    )


def curve_of(points: Iterable[PointSummary], *, worst: bool = False) -> Curve:
    """Return the bytes per adapter and gains of points, as a curve."""
    return frontier((point.per_adapter, point.worst if worst else point.gain) for point in points)


def bd_rates(
    points: Sequence[PointSummary], lowest: tuple[float, float] = (-math.inf, -math.inf)
) -> dict[str, dict[str, Any]]:
    """Return the BD-rate of icm against each family and against the best of the others, for mean and worst gain.

    Negative is good: -0.5 is half the bytes at the same gain. None where the curves share no range of gain.

    Args:
        points: Of icm and of the others.
        lowest: Mean and worst gain from which on they are compared.
    """
    families: defaultdict[str, list[PointSummary]] = defaultdict(list)
    for point in points:
        families[point.family].append(point)
    ours = families.pop(OURS, [])
    if not ours:
        return {}
    rates: dict[str, dict[str, Any]] = {}
    for worst in (False, True):
        mine = curve_of(ours, worst=worst)
        others = {name: curve_of(found, worst=worst) for name, found in families.items()}
        published = [curve for name, curve in others.items() if not name.endswith(STRENGTHENED)]
        others |= {"best of all": envelope(others.values()), "best as published": envelope(published)}
        for name, curve in others.items():
            found = bd_rate(mine, curve, lowest[worst])
            value = None if found is None else asdict(found)
            rates.setdefault(name, {})["worst" if worst else "mean"] = value
    return rates


def report(results: Sequence[PointResult]) -> dict[str, Any]:
    """Return everything that the study found as one JSON object."""
    points = [summarise(result) for result in results]
    details = [{**_finite(asdict(point)), **_details(result)} for point, result in zip(points, results, strict=True)]
    tasks = results[0].tasks
    return {
        "tasks": len(tasks),
        "bf16_total": sum(task.bf16_size for task in tasks),
        "bd_rates": bd_rates(points),
        "bd_rates_at_high_gains": bd_rates(points, HIGH),
        "bd_rates_without_refinement": bd_rates([point for point in points if not point.name.startswith(REFINED)]),
        "points_above_icm": [asdict(point) for point in above_ours(points)],
        "points": details,
    }


def above_ours(points: Sequence[PointSummary], lowest: float = 0.01, highest: float = 0.25) -> list[PointSummary]:
    """Return the points between two rates that keep more on average than icm does in as many bytes."""
    ours = frontier((point.share, point.gain) for point in points if point.family == OURS)
    others = [point for point in points if point.family != OURS and lowest <= point.share <= highest]
    return [point for point in others if ours and point.gain > gain_at(ours, point.share)]


def gain_at(curve: Curve, size: float) -> float:
    """Return what a curve keeps at a size, linear in its logarithm: the last gain above its range, none below it."""
    if size < curve[0][0]:
        return -math.inf
    sizes, gains = zip(*curve, strict=True)
    return float(np.interp(math.log(size), np.log(sizes), gains))


def _details(result: PointResult) -> dict[str, Any]:
    return {"shared": result.shared, "notes": result.notes, "by_task": [asdict(task) for task in result.tasks]}


def _finite(fields: dict[str, Any]) -> dict[str, Any]:
    """Return fields for JSON, which has no word for a gain that does not exist."""
    return {key: None if value != value else value for key, value in fields.items()}


def table(points: Iterable[PointSummary]) -> str:
    """Write points as a Markdown table, by family and bytes."""
    lines = [
        "| method | point | of bf16 | one more task | squared error | gain | worst | worst task |",
        "|---|---|" + "--:|" * 5 + "---|",
    ]
    for point in sorted(points, key=lambda point: (point.family, -point.share)):
        shares = f"{100 * point.share:.2f} % | {100 * point.marginal_share:.2f} %"
        figures = f"{point.dw_error:.3f} | {point.gain:.3f} | {point.worst:.3f} | {point.worst_task}"
        lines.append(f"| {point.family} | {point.name} | {shares} | {figures} |")
    return "\n".join(lines)
