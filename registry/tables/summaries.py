"""Which tasks a listing shows, and what of them: read as columns, and without those that have wrong rows.

Nothing here needs SQLAlchemy, which takes longer to import than thousands of tasks to read, unless a row is wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, TypeVar

from registry.errors import DamagedStore
from registry.storage.database import Columns
from registry.tables import summary_rows
from registry.tables.table import Table

if TYPE_CHECKING:
    from registry.filters import Selection
    from registry.records import GeneratorRecord, TaskFigures, TaskRecord, TaskSummary

T = TypeVar("T")

_PAGE = 1_000


class Summaries(Table):
    """Tasks with what a listing shows of them."""

    def count(self) -> int:
        """Return how many tasks there are, also damaged ones."""
        with self._db.columns() as columns:
            (number,) = columns.execute("SELECT count(*) FROM tasks").fetchone()
        return int(number)

    def all(self) -> Iterator[TaskRecord]:
        """Yield all tasks by name; few at a time."""
        yield from self._pages(summary_rows.tasks, self._selected(None, ()))

    def names(self, selection: Selection | None = None, *, without: Collection[int] = ()) -> list[str]:
        """Return the names of the selected tasks, in the order that the selection asks for."""
        return list(self._pages(summary_rows.names, self._selected(selection, without)))

    def summaries(
        self, selection: Selection | None = None, *, without: Collection[int] | None = None
    ) -> Iterator[TaskSummary]:
        """Yield the selected tasks, in the order asked for, with what a listing shows of them; few at a time.

        All rows that a task has are checked as it is read, unless the caller has checked every row and gives the
        numbers of the tasks `without` which to go on. A filter or an order may pass over a task with a wrong row.
        """
        load = _checked_summaries if without is None else summary_rows.summaries
        yield from self._pages(load, self._selected(selection, without or ()))

    def figures(self, *, without: Collection[int]) -> Iterator[TaskFigures]:
        """Yield what a bill says of all tasks, by name, but of those `without` which the caller goes on.

        Rows are not checked: the caller has checked every one.
        """
        yield from self._pages(summary_rows.figures, self._selected(None, without))

    def first(self, count: int) -> list[TaskSummary]:
        """Return the first tasks by name, and look at no rows of others."""
        from registry.filters import Selection

        found: list[TaskSummary] = []
        seen = 0
        while True:  # once, unless some have wrong rows
            numbers = self._selected(Selection(limit=seen + count), ())[seen:]
            found += islice(self._pages(_checked_summaries, numbers, count), count - len(found))
            seen += count
            if len(found) == count or len(numbers) < count:
                return found

    def wrong_rows(self) -> dict[str, set[int]]:
        """Check all rows, also those that a listing counts, compares or passes over, and tell of the wrong ones.

        Return what is wrong with a row -> the numbers of the tasks whose figures depend on it.
        """
        with self._db.columns() as columns:
            if columns.are_right():
                return {}
        found = self._db.wrong_tasks()
        for fact, numbers in found.items():
            error = self._db.damaged_row(fact)
            if self._on_damage is None:
                raise error
            for name in sorted(map(self._name_of, numbers)) or ["a row without a task"]:
                self._on_damage(name, error)
        return found

    def generator(self, base_model: str) -> GeneratorRecord | None:
        """Return the current generator of a base model, if it has one; its row is not checked."""
        with self._db.columns() as columns:
            return summary_rows.generator(columns, base_model)

    def vector_files(self) -> dict[int, list[str]]:
        """Return number of a task -> the digests of the files of its vectors; rows are not checked."""
        with self._db.columns() as columns:
            return summary_rows.vector_files(columns)

    def vectors_stamp(self) -> str:
        """Return a digest that changes with the vectors of any task, and with its name or its base model.

        It is of the checks that the rows were written with. So whatever was derived from rows that passed is right
        as long as the stamp is the same, also if one of them is damaged since.
        """
        with self._db.columns() as columns:
            return summary_rows.vectors_stamp(columns)

    def _selected(self, selection: Selection | None, without: Collection[int]) -> Sequence[int]:
        from registry.filters import Selection  # most commands read one task
        from registry.tables.listing import selected

        with self._db.columns() as columns:
            return selected(columns, selection or Selection(), without)

    def _pages(
        self, load: Callable[[Columns, Sequence[int]], list[T]], numbers: Sequence[int], size: int = 0
    ) -> Iterator[T]:
        """Load some tasks, few at a time. Each page is one short read, so that a slow reader delays nobody."""
        size = min(size or _PAGE, _PAGE)
        for at in range(0, len(numbers), size):
            yield from self._undamaged(load, numbers[at : at + size])

    def _undamaged(self, load: Callable[[Columns, Sequence[int]], list[T]], numbers: Sequence[int]) -> list[T]:
        """Load some tasks, without those that have wrong rows."""
        try:
            with self._db.columns() as columns:
                return load(columns, numbers)
        except DamagedStore as error:
            if self._on_damage is None:
                raise
            if len(numbers) > 1:
                half = len(numbers) // 2
                return [one for some in (numbers[:half], numbers[half:]) for one in self._undamaged(load, some)]
            self._on_damage(self._name_of(numbers[0]), error)
            return []

    def _name_of(self, number: int) -> str:
        """Return the name of a task that may be damaged."""
        with self._db.columns() as columns:
            row = columns.execute("SELECT name FROM tasks WHERE id = ?", (number,)).fetchone()
        return row[0] if row and row[0] else f"number {number}"


def _checked_summaries(columns: Columns, numbers: Sequence[int]) -> list[TaskSummary]:
    summary_rows.check(columns, numbers)
    return summary_rows.summaries(columns, numbers)
