"""Find tasks whose adapters are the same, or nearly: fetched twice, saved again, or cut from another one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated

from icmlora.errors import DataError
from icmlora.fleet.context import Context, base_name, check_base_model, use_case
from icmlora.fleet.params import BaseModelName, Param, Tasks
from registry.filters import Selection

if TYPE_CHECKING:
    from icmlora.fleet.resources.stored_vectors import LeftOut

MAX_DISTANCE = 0.5
"""Unrelated adapters are at about 1: beyond a half, nearly every pair would have to be read."""


@dataclass(frozen=True)
class DuplicatePair:
    """A task and another one that its adapter is like."""

    task: str
    # The oldest one of its group; if that is farther than the limit, the nearest task linking it to the group.
    like: str
    same_tensors: bool  # whether their tensors are equal, and mean the same
    distance: float  # ||dW - dW'|| / max(||dW||, ||dW'||); 0 for the same tensors
    extras_differ: bool = False  # whether heads, biases or other tensors next to dW differ


@dataclass(frozen=True)
class DuplicateGroup:
    """Tasks of one base model that are connected by distances within the limit."""

    base_model: str
    tasks: tuple[str, ...]  # the tasks, oldest first
    pairs: tuple[DuplicatePair, ...]  # one for each task but the oldest, nearest first


@dataclass
class DuplicatesReport:
    """Tasks that are alike."""

    max_distance: float  # the limit
    compared: int = 0  # how many tasks were compared
    groups: list[DuplicateGroup] = field(default_factory=list)  # tasks that are alike, the largest group first
    # Tasks with the same tensors as an older task of another base model.
    other_bases: list[DuplicatePair] = field(default_factory=list)
    from_codes: list[str] = field(default_factory=list)  # evicted tasks, compared as what their codes decode to
    # Tasks that can have no code: only their tensors were compared.
    tensors_only: list[str] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)  # tasks that could not be read


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
    from icmlora.fleet.tasks.comparison import Comparison, Steps, across_bases, age  # imports torch

    report = DuplicatesReport(max_distance)
    with context.open(read_only=True) as store:
        wanted, counts = {task.name: task.base_model for task in map(store.task, tasks)}, store.task_counts()
        base_model = base_name(store, base_model)
        check_base_model(base_model, counts)
        chosen = sorted(base for base in set(wanted.values()) or counts if base_model in (None, base))
        steps = Steps(context, sum(counts[base] for base in chosen))
        for base in chosen:
            found = sorted(store.tasks(Selection(base_model=base)), key=age)
            if found:
                report.groups += Comparison(store, found, report, steps).groups(wanted)
        if base_model is None:
            pairs = across_bases(store)
            report.other_bases = [pair for pair in pairs if not wanted or {pair.task, pair.like} & wanted.keys()]
    report.groups.sort(key=lambda group: (-len(group.tasks), group.base_model, group.tasks))
    return report
