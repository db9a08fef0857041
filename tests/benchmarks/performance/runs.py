"""Repeated timing: cases take turns, so that what else the machine does meets all of them alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median


@dataclass(frozen=True)
class Timing:
    """What one run of one case took, in seconds; `cpu` is of this process alone, over all its threads."""

    wall: float
    cpu: float


def alternate(cases: Mapping[str, Callable[[], object]], runs: int) -> dict[str, list[Timing]]:
    """Run every case once unmeasured, then `runs` times, one after the other in turn."""
    for case in cases.values():
        case()
    timings: dict[str, list[Timing]] = {name: [] for name in cases}
    for _ in range(runs):
        for name, case in cases.items():
            timings[name].append(_time(case))
    return timings


def walls(timings: list[Timing]) -> list[float]:
    """Return the elapsed seconds of each run, to the tenth of a millisecond."""
    return [round(timing.wall, 4) for timing in timings]


def ratio(numerators: list[float], denominators: list[float]) -> float:
    """Return the median of the ratios of neighbouring runs: slow moments meet both, and cancel."""
    return round(median(above / below for above, below in zip(numerators, denominators, strict=True)), 3)


def _time(case: Callable[[], object]) -> Timing:
    wall, cpu = time.perf_counter(), time.process_time()
    case()
    return Timing(time.perf_counter() - wall, time.process_time() - cpu)
