"""Methods side by side over the tasks of one evaluation: bytes of a task, error, retained gain."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from icm_cli.workflows.accounting import Bill, FleetBill, TaskBill
from icm_cli.workflows.evaluating import EvaluateReport, TaskEvaluated


@dataclass(frozen=True)
class MethodSummary:
    """One method over the tasks it was measured on.

    Attributes:
        method: A rung or a baseline.
        tasks: How many.
        task_size: Mean bytes of a task, its part of what is stored once included.
        marginal_size: Mean bytes of one more task.
        share: `task_size` in terms of bf16.
        dw_error: Mean relative dW error; None where none was measured.
        mean: Mean retained gain; None where no original has a gain.
        worst: Smallest retained gain.
        worst_task: Whose it is.
    """

    method: str
    tasks: int
    task_size: float
    marginal_size: float
    share: float
    dw_error: float | None
    mean: float | None
    worst: float | None
    worst_task: str | None


@dataclass(frozen=True)
class _Cell:
    """One method on one task."""

    task: str
    bf16: int
    marginal: float
    shared: float
    gain: float | None
    dw_error: float | None


def compare(report: EvaluateReport, bill: Bill) -> list[MethodSummary]:
    """Sum up the rungs that have bytes and all baselines, most bytes first.

    A task that is not in the bill is passed over: it was removed since it was measured.
    """
    bills = {task.task: (fleet, task) for fleet in bill.fleets for task in fleet.tasks}
    cells: defaultdict[str, list[_Cell]] = defaultdict(list)
    for done in report.tasks:
        if done.task in bills:
            for method, cell in _cells(done, *bills[done.task]):
                cells[method].append(cell)
    return sorted((_summary(method, found) for method, found in cells.items()), key=lambda row: -row.task_size)


def _cells(done: TaskEvaluated, fleet: FleetBill, task: TaskBill) -> Iterator[tuple[str, _Cell]]:
    rungs = {str(rung): result for rung, result in done.rungs.items()}
    code = (task.code_size or 0) + task.vectors_size
    sizes = {"residual": task.size, "code": code, "generate": task.vectors_size}
    for rung, size in sizes.items():
        if rung in rungs:
            shared = fleet.generator_size / max(len(fleet.encoded), 1)
            found = rungs[rung]
            yield rung, _Cell(done.task, task.bf16_size, size, shared, found.retained_gain, found.dw_error)
    for name, result in done.baselines.items():
        shared = result.shared_size / result.fleet_size
        yield name, _Cell(done.task, task.bf16_size, result.size, shared, result.retained_gain, result.dw_error)


def _summary(method: str, cells: list[_Cell]) -> MethodSummary:
    count = len(cells)
    total = sum(cell.marginal + cell.shared for cell in cells)
    errors = [cell.dw_error for cell in cells if cell.dw_error is not None]
    gains = [(cell.gain, cell.task) for cell in cells if cell.gain is not None]
    worst, worst_task = min(gains, default=(None, None))
    return MethodSummary(
        method=method,
        tasks=count,
        task_size=total / count,
        marginal_size=sum(cell.marginal for cell in cells) / count,
        share=total / max(sum(cell.bf16 for cell in cells), 1),
        dw_error=math.fsum(errors) / len(errors) if errors else None,
        mean=math.fsum(gain for gain, _ in gains) / len(gains) if gains else None,
        worst=worst,
        worst_task=worst_task,
    )
