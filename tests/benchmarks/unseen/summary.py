"""Losses to retained gains, gains to means with intervals."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tests.benchmarks.unseen.fleet import StudyTask

_DRAWS = 2000
_INTERVAL = (2.5, 97.5)

Losses = Mapping[tuple[str, str, int], float]
"""(task, row, seed) -> nats per token."""


def summarise(measured: Losses, tasks: Sequence[StudyTask], folds: Sequence[Sequence[StudyTask]]) -> dict[str, Any]:
    """Return the table of rows, that of groups, and every gain.

    A row's mean is over tasks of means over seeds; its interval comes from drawing tasks with replacement.
    """
    gains: defaultdict[str, defaultdict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for (task, row, _), nats in sorted(measured.items()):
        base, own = (measured.get((task, end, 0), math.nan) for end in ("base", "own"))
        gains[row][task].append((base - nats) / (base - own))
    found = {row: {task: float(np.mean(values)) for task, values in of.items()} for row, of in gains.items()}
    return {
        "tasks": [
            {"name": task.name, "group": task.group, "family": task.family, "fold": number}
            for number, fold in enumerate(folds)
            for task in fold
        ],
        "rows": {row: _statistics(of, gains[row]) for row, of in sorted(found.items())},
        "groups": {row: _by_group(of, tasks) for row, of in sorted(found.items())},
        "gains": found,
    }


def _statistics(of: Mapping[str, float], seeds: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    values = np.array(list(of.values()))
    draw = np.random.default_rng(0).integers(len(values), size=(_DRAWS, len(values)))
    low, high = np.percentile(values[draw].mean(axis=1), _INTERVAL)
    spread = [float(np.std(some)) for some in seeds.values() if len(some) > 1]
    return {
        "tasks": len(values),
        "mean": float(values.mean()),
        "low": float(low),
        "high": float(high),
        "median": float(np.median(values)),
        "worst": float(values.min()),
        "between_seeds": float(np.mean(spread)) if spread else None,
    }


def _by_group(of: Mapping[str, float], tasks: Sequence[StudyTask]) -> dict[str, float]:
    groups: defaultdict[str, list[float]] = defaultdict(list)
    for task in tasks:
        if task.name in of:
            groups[task.group].append(of[task.name])
    return {group: float(np.mean(values)) for group, values in sorted(groups.items())}


def table(document: Mapping[str, Any]) -> str:
    """Return the rows as a Markdown table, best first."""
    lines = ["| row | tasks | retained gain | 95 % | median | worst |", "|---|--:|--:|--:|--:|--:|"]
    for row, one in sorted(document["rows"].items(), key=lambda item: -item[1]["mean"]):
        interval = f"{one['low']:.3f} to {one['high']:.3f}"
        lines.append(
            f"| {row} | {one['tasks']} | {one['mean']:.3f} | {interval} | {one['median']:.3f} | {one['worst']:.3f} |"
        )
    return "\n".join(lines)
