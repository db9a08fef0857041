"""What `icm map` shows: a fleet's map, and the tasks that are not on it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from icm_cli.workflows.known_vectors import LeftOut
from icmlora.task_map import TaskMap
from registry.records import View


@dataclass(frozen=True)
class MappedFleet:
    """The map of one base model's tasks.

    Attributes:
        support_sets: How many vectors it was made from.
        left_out: Tasks of the base model that are not on it.
    """

    base_model: str
    view: View
    map: TaskMap
    support_sets: int
    left_out: tuple[LeftOut, ...]


def grouped_reasons(left_out: Sequence[LeftOut]) -> list[str]:
    """Return a line for each reason why tasks are not on a map, with their names."""
    names: defaultdict[str, list[str]] = defaultdict(list)
    for entry in left_out:
        names[entry.reason].append(entry.task)
    return [f"{reason}: {', '.join(tasks)}" for reason, tasks in names.items()]
