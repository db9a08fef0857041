"""One measured figure, its limit, and the table of them all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal


@dataclass(frozen=True)
class Figure:
    """What was measured.

    Attributes:
        value: The figure: the median of the runs, or the median of their ratios.
        unit: `s`, `ratio` or `bytes`.
        limit: What issue and README promise, or None where nothing is.
        bound: Which side of the limit is good.
        runs: Every run's figure, in order.
    """

    name: str
    value: float
    unit: Literal["s", "ratio", "bytes"]
    limit: float | None = None
    bound: Literal["at least", "below"] = "below"
    runs: tuple[float, ...] = ()

    @property
    def is_met(self) -> bool | None:
        """Say whether the limit is kept; None where there is none."""
        if self.limit is None:
            return None
        return self.value >= self.limit if self.bound == "at least" else self.value < self.limit


def seconds(name: str, runs: Sequence[float], limit: float | None = None) -> Figure:
    """Make a figure of elapsed times: their median."""
    return Figure(name, round(median(runs), 4), "s", limit, runs=tuple(runs))


def table(figures: Sequence[Figure]) -> str:
    """Write figures as a Markdown table."""
    lines = ["| figure | measured | promised | kept |", "|---|--:|--:|---|"]
    for figure in figures:
        promised = "" if figure.limit is None else f"{figure.bound} {_text(figure.limit, figure.unit)}"
        kept = {True: "yes", False: "NO", None: ""}[figure.is_met]
        lines.append(f"| {figure.name} | {_text(figure.value, figure.unit)} | {promised} | {kept} |")
    return "\n".join(lines)


def _text(value: float, unit: str) -> str:
    if unit == "bytes":
        return f"{value / 2**30:.2f} GiB"
    return f"{value:.2f}" if unit == "ratio" else f"{value:.3f} s" if value < 10 else f"{value:.0f} s"
