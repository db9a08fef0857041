"""The prior of the source `recalled`: a mixture over the codes of the known tasks and what the network predicts.

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
from registry.records import AdapterRecord, CodeRecord, GeneratorRecord, View

if TYPE_CHECKING:
    from registry.store import Store

_VIEWS: tuple[View, ...] = ("context", "adapted")  # the first one that a task has is compared


class Exemplars:
    """The tasks of one generator as exemplars; their vectors are read once."""

    def __init__(self, store: Store, generator: GeneratorRecord) -> None:
        self._store, self._generator = store, generator
        self._of_view = cache(self._read_view)

    def code_for(self, final: AdapterRecord) -> CodeRecord | None:
        """Return the code of the known task recognized from a task's vectors, None if none is.

        None is also returned where too few tasks can be compared, and where the recognised task has no code that fits
        the modules of this one.
        """
        for view in _VIEWS:
            known, recognizer = self._of_view(view)
            if final.task in known.vectors:
                break
        else:
            return None
        if recognizer is None:
            return None
        task = recognizer.recognize(known.vectors[final.task]).task
        code = None if task is None else self._store.codes.get(task, self._generator.id)
        if code is None or (task != final.task and not _fits(self._store.tasks.final(code.task), final)):
            return None
        return code

    def _read_view(self, view: View) -> tuple[ComparableVectors, Recognizer | None]:
        """Return the vectors of a view, and what recognises the tasks among them that have a code."""
        store, generator = self._store, self._generator
        tasks = [task for task in store.tasks.all() if task.base_model == generator.base_model]
        known = comparable_vectors(store, tasks, view)
        coded = {code.task for code in store.codes.all(generator.id)}
        try:
            return known, Recognizer({name: vectors for name, vectors in known.vectors.items() if name in coded})
        except TooFewVectors:
            return known, None


def _fits(exemplar: AdapterRecord, final: AdapterRecord) -> bool:
    """Say whether an adapter can be written in the form of another: the same modules, and no larger ranks."""
    mine = {module: (inputs, outputs, rank) for module, rank, inputs, outputs in final.layout}
    theirs = {module: (inputs, outputs, rank) for module, rank, inputs, outputs in exemplar.layout}
    return mine.keys() == theirs.keys() and all(
        mine[module][:2] == theirs[module][:2] and theirs[module][2] <= mine[module][2] for module in mine
    )
