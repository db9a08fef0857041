"""Count what a store takes on disk, what its generators and codes save, and what they cost in quality.

Sizes are those of the files. A blob that several rows share counts once in the totals, and fully in each task's line.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from icmlora.fleet.context import Context, use_case
from icmlora.fleet.stats.bill import BaseModelBill, Bill, TaskBill
from registry.records import GeneratorRecord, TaskSummary
from registry.tables.evaluations import latest

if TYPE_CHECKING:
    from registry.store import Store

_BF16 = 2  # bytes per parameter: what a user would otherwise keep


@use_case
def stats(context: Context, *, plot: str | Path | None = None, force: bool = False) -> Bill:
    """Count the bytes on disk, what the codes save, and what they cost in quality.

    Args:
        context: The store.
        plot: Also draw bytes against the number of tasks to this .svg, .png or .pdf file (needs matplotlib).
        force: Replace the file if it exists.

    Raises:
        DataError: The plot has another ending, matplotlib is missing, or no task has a code to draw.
        OutputExists: The file exists and `force` is not given.
    """
    plot = None if plot is None else Path(plot)
    if plot is None:
        return bill(context)
    from icmlora.fleet.stats.bill_picture import check_plot, plot_bill

    check_plot(plot, force=force)
    found = bill(context)
    plot_bill(found, plot, force=force)
    return found


def bill(context: Context) -> Bill:
    """Count everything. Reads rows and file sizes, but no file's content."""
    with context.open(read_only=True) as store:
        return bill_of(store, *sound_tasks(store))


def sound_tasks(store: Store) -> tuple[list[TaskSummary], bool]:
    """Tell of wrong rows; return the tasks whose figures depend on none, and whether there are any."""
    wrong = store.tasks.wrong_rows()
    return list(store.tasks.summaries(without=set[int]().union(*wrong.values()))), bool(wrong)


def bill_of(store: Store, rows: Sequence[TaskSummary], has_wrong_rows: bool) -> Bill:
    """Count everything in an open store, of which `rows` are all tasks whose figures depend on no wrong row."""
    labels = sorted({row.task.base_model for row in rows})
    per_task = _TaskBills(store, [row.task.name for row in rows])
    fleets = []
    for label in labels:
        generator = store.generators.current(label)
        tasks = tuple(per_task.of(row, generator) for row in rows if row.task.base_model == label)
        extras = {
            extra.blob: extra.packed_size for row in rows if row.task.base_model == label for extra in row.final.extras
        }
        fleets.append(BaseModelBill(label, generator, tasks, sum(extras.values())))
    return Bill(store.usage(has_wrong_rows=has_wrong_rows), tuple(fleets))


class _TaskBills:
    """Makes the bill of each task from rows that are read once: a query for each of a thousand tasks takes seconds."""

    def __init__(self, store: Store, tasks: Sequence[str]) -> None:
        self._vectors, self._evaluations = store.vectors.of(tasks), store.evaluations.of(tasks)
        self._size = store.blobs.size

    def of(self, row: TaskSummary, generator: GeneratorRecord | None) -> TaskBill:
        code, measured = row.code, None
        if code is not None and generator is not None:
            measured = latest(self._evaluations.get(row.task.name, ()), row.task, code.rung, generator)
        return TaskBill(
            task=row.task.name,
            bf16_size=_BF16 * row.final.parameters
            + sum(extra.size for extra in row.final.extras if extra.file is None),
            original_size=row.final.stored_bytes,
            vectors_size=sum(map(self._size, {vector.blob for vector in self._vectors.get(row.task.name, ())})),
            code_size=None if code is None else code.size,
            residual_size=None if code is None or code.residual is None else code.residual.size,
            rung=None if code is None else code.rung,
            squared_error=None if code is None else code.best_squared_error,
            retained_gain=None if measured is None else measured.retained_gain,
            precision=None if measured is None else measured.precision,
            evicted=row.final.is_evicted,
            asked=None if code is None else code.asked,
            original_only=row.final.original_only,
            extras_bytes=row.final.extras_bytes,
            is_claimed=code is not None and code.claim is not None,
        )
