"""Compare the sources of a fleet with other methods: mean bytes per task, error and retained gain of each."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from icmlora.fleet.stats.bill import BaseModelBill, Bill, TaskBill
from registry.records import Rung

if TYPE_CHECKING:
    from icmlora.fleet.measure.evaluate import TaskEvaluated


@dataclass(frozen=True)
class MethodSummary:
    """One method over the tasks that it was measured on."""

    method: str
    tasks: int
    task_size: float  # mean bytes per task, including its part of what is stored once
    marginal_size: float  # mean bytes of one more task
    share: float  # `task_size` as a share of bf16
    relative_error: float | None  # mean over the tasks; None where none was measured
    squared_error: float | None  # mean of the squares
    mean: float | None  # mean retained gain; None where no original has a gain
    worst: float | None
    worst_task: str | None


@dataclass(frozen=True)
class _Cell:
    """One method on one task; sizes in bytes."""

    task: str
    bf16: int
    marginal: float
    shared: float
    gain: float | None
    squared_error: float | None


def compare(tasks: Sequence[TaskEvaluated], bill: Bill) -> list[MethodSummary]:
    """Sum up all baselines, and the sources that take bytes, largest first."""
    bills = {task.task: (fleet, task) for fleet in bill.fleets for task in fleet.tasks}
    cells: defaultdict[str, list[_Cell]] = defaultdict(list)
    for done in tasks:
        # Another process may have removed the task since it was measured.
        if done.task in bills:
            for method, cell in _cells(done, *bills[done.task]):
                cells[method].append(cell)
    return sorted((_summary(method, found) for method, found in cells.items()), key=lambda row: -row.task_size)


def _cells(done: TaskEvaluated, fleet: BaseModelBill, task: TaskBill) -> Iterator[tuple[str, _Cell]]:
    code = (task.code_size or 0) + task.vectors_size
    sizes: dict[Rung, int] = {"residual": task.size, "code": code, "generate": code, "network": task.vectors_size}
    for source, size in sizes.items():
        if source in done.sources:
            shared = fleet.generator_size / max(len(fleet.encoded), 1)
            found = done.sources[source]
            yield source, _Cell(done.task, task.bf16_size, size, shared, found.retained_gain, found.squared_error)
    for name, result in done.baselines.items():
        shared = result.shared_size / result.fleet_size
        yield name, _Cell(done.task, task.bf16_size, result.size, shared, result.retained_gain, result.squared_error)


def _summary(method: str, cells: list[_Cell]) -> MethodSummary:
    count = len(cells)
    total = sum(cell.marginal + cell.shared for cell in cells)
    errors = [cell.squared_error for cell in cells if cell.squared_error is not None]
    gains = [(cell.gain, cell.task) for cell in cells if cell.gain is not None]
    worst, worst_task = min(gains, default=(None, None))
    return MethodSummary(
        method=method,
        tasks=count,
        task_size=total / count,
        marginal_size=sum(cell.marginal for cell in cells) / count,
        share=total / max(sum(cell.bf16 for cell in cells), 1),
        relative_error=math.fsum(map(math.sqrt, errors)) / len(errors) if errors else None,
        squared_error=math.fsum(errors) / len(errors) if errors else None,
        mean=math.fsum(gain for gain, _ in gains) / len(gains) if gains else None,
        worst=worst,
        worst_task=worst_task,
    )
