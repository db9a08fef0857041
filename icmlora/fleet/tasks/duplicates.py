"""Find tasks whose adapters are the same, or nearly: fetched twice, saved again, or cut from another one."""

from __future__ import annotations

from typing import Annotated

from icmlora.errors import DataError
from icmlora.fleet.context import Context, base_name, check_base_model, use_case
from icmlora.fleet.params import BaseModelName, Param, Tasks
from icmlora.fleet.tasks.duplicate_pairs import DuplicatesReport
from registry.filters import Selection

MAX_DISTANCE = 0.5
"""Unrelated adapters are at about 1: beyond a half, nearly every pair would have to be read."""


@use_case
def find_duplicates(
    context: Context,
    tasks: Tasks = (),
    *,
    max_distance: Annotated[
        float,
        Param(
            "Largest distance of a near copy. 0 finds only equal adapters.",
            "--max-distance X",
            min=0.0,
            max=MAX_DISTANCE,
        ),
    ] = 0.1,
    base_model: BaseModelName = None,
) -> DuplicatesReport:
    """Find tasks with equal or similar adapters.

    `=` marks equal tensors and scale. `~` marks near copies within DISTANCE, ||dW - dW'|| / max(||dW||, ||dW'||),
    among tasks of one base model, regardless of rank, type and format. Each task is compared with the oldest of its
    group, or with the nearest if the oldest is too far. With TASKS, only groups with these tasks are shown. Nothing is
    changed. --quiet prints one group per line.

    Example:
      icm duplicates
      icm duplicates dog-v2 --max-distance 0.3

    Raises:
        DataError: The distance is not between 0 and 0.5, or no task belongs to the base model.
    """
    if not 0.0 <= max_distance <= MAX_DISTANCE:
        fact = f"a distance of {max_distance:g} is not between 0 and {MAX_DISTANCE:g}"
        raise DataError(fact, hint="use less than 0.01 for rounded copies; unrelated adapters are at about 1")
    from icmlora.fleet.tasks.comparison import Comparison, ReadCounter, across_bases, age  # imports torch

    report = DuplicatesReport(max_distance)
    with context.open(read_only=True) as store:
        wanted, counts = {task.name: task.base_model for task in map(store.task, tasks)}, store.task_counts()
        base_model = base_name(store, base_model)
        check_base_model(base_model, counts)
        chosen = sorted(base for base in set(wanted.values()) or counts if base_model in (None, base))
        steps = ReadCounter(context, sum(counts[base] for base in chosen))
        for base in chosen:
            found = sorted(store.tasks(Selection(base_model=base)), key=age)
            if found:
                report.groups += Comparison(store, found, report, steps).groups(wanted)
        if base_model is None:
            pairs = across_bases(store)
            report.other_bases = [pair for pair in pairs if not wanted or {pair.task, pair.like} & wanted.keys()]
    report.groups.sort(key=lambda group: (-len(group.tasks), group.base_model, group.tasks))
    return report
