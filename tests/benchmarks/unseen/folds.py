"""Which tasks are left out together: whole families, spread so that every fold has some of every group."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from tests.benchmarks.unseen.fleet import StudyTask

FOLDS = 5


def folds_of(tasks: Sequence[StudyTask], count: int = FOLDS) -> list[list[StudyTask]]:
    """Deal families to folds: group by group, larger families first, each to the fold with the fewest tasks."""
    families: defaultdict[tuple[str, str], list[StudyTask]] = defaultdict(list)
    for task in tasks:
        families[task.group, task.family].append(task)
    folds: list[list[StudyTask]] = [[] for _ in range(count)]
    for (group, _), members in sorted(families.items(), key=lambda item: (item[0][0], -len(item[1]), item[0][1])):
        of_group = [sum(task.group == group for task in fold) for fold in folds]
        place = min(range(count), key=lambda number: (of_group[number], len(folds[number]), number))
        folds[place] += members
    return folds
