"""The prior of the source `recalled`: a mixture over the codes of the known tasks and the network's prediction.

    vectors of a task ──recognition──▶ a weight for each known task ──largest──▶ its code
                                       a weight for "none of them"  ──largest──▶ the network's prior

This is an exemplar prior (Norouzi et al., arXiv 2004.04795). Only the component with the largest weight is decoded:
one task has nearly all of it, and a mean of the adapters of different tasks is an adapter of none.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from icmlora.fleet.resources.stored_vectors import ComparableVectors, comparable_vectors
from icmlora.task_vectors.recognition import Recognizer, TooFewVectors
from registry.filters import Selection
from registry.manifests import Task, View

if TYPE_CHECKING:
    from registry.store import Store

_VIEWS: tuple[View, ...] = ("context", "adapted")  # the first one that a task has is compared


class Exemplars:
    """The tasks of one base model as exemplars; their vectors are read once."""

    def __init__(self, store: Store, base_model: str) -> None:
        self._store, self._base_model = store, base_model
        self._of_view = cache(self._read_view)

    def recognized(self, task: Task) -> Task | None:
        """Return the known task, with a code, that is recognized from a task's vectors; None if none is.

        None is also returned if too few tasks can be compared, or the code of the recognized task does not fit the
        modules of this one.
        """
        for view in _VIEWS:
            known, recognizer = self._of_view(view)
            if task.name in known.vectors:
                break
        else:
            return None
        if recognizer is None:
            return None
        name = recognizer.recognize(known.vectors[task.name]).task
        found = None if name is None else self._store.find(name)
        if found is None or found.code is None:
            return None
        if found.name == task.name:
            return found
        # It can be written in the form of this one if it has the same modules, and no larger ranks.
        mine, theirs = ({name: (rank, shape) for name, rank, *shape in one.final.layout} for one in (task, found))
        fits = mine.keys() == theirs.keys() and all(
            shape == mine[name][1] and rank <= mine[name][0] for name, (rank, shape) in theirs.items()
        )
        return found if fits else None

    def _read_view(self, view: View) -> tuple[ComparableVectors, Recognizer | None]:
        """Return the vectors of a view, and a recognizer of the tasks among them that have a code."""
        tasks = list(self._store.tasks(Selection(base_model=self._base_model)))
        known = comparable_vectors(self._store, tasks, view)
        coded = {task.name for task in tasks if task.code is not None}
        try:
            return known, Recognizer({name: vectors for name, vectors in known.vectors.items() if name in coded})
        except TooFewVectors:
            return known, None
