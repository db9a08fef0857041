"""Count what a store takes on disk, what its generators and codes save, and what they cost in quality.

Sizes are those of the files. A blob that several rows share counts once in the totals, and fully in each task's line.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from icmlora.fleet.context import Context
from registry.evaluations import latest
from registry.records import Asked, EvaluationRecord, GeneratorRecord, TaskSummary

if TYPE_CHECKING:
    from registry.store import Store
    from registry.usage import Usage

_BF16 = 2  # bytes per parameter: what a user would otherwise keep


@dataclass(frozen=True)
class TaskBill:
    """The bytes and the quality of one task. Fields about its code are None where it has none or it was not measured.

    Attributes:
        task: Its name.
        bf16_size: Its final adapter in bfloat16.
        original_size: The files of its final adapter on disk; without the weights if it is evicted.
        vectors_size: Its task vectors.
        code_size: Its code under the current generator.
        residual_size: The residual stored with that code.
        rung: What it can be written from without its original.
        dw_error: The relative dW error of that.
        retained_gain: The retained gain of that.
        evicted: Whether its original was deleted.
        asked: The limits that its code was made for.
    """

    task: str
    bf16_size: int
    original_size: int
    vectors_size: int
    code_size: int | None
    residual_size: int | None
    rung: Literal["residual", "code"] | None
    dw_error: float | None
    retained_gain: float | None
    evicted: bool
    asked: Asked | None

    @property
    def size(self) -> int:
        """Code, residual and vectors: everything but the original."""
        return (self.code_size or 0) + (self.residual_size or 0) + self.vectors_size

    @property
    def fell_short(self) -> bool:
        """Whether no code meets its limits, so that its original has to stay."""
        return self.asked is not None and not self.asked.is_kept and not self.evicted


@dataclass(frozen=True)
class BaseModelBill:
    """The tasks of one base model."""

    base_model: str
    generator: GeneratorRecord | None
    tasks: tuple[TaskBill, ...]

    @property
    def bf16_size(self) -> int:
        """Every final adapter in bfloat16: the denominator of every saving."""
        return sum(task.bf16_size for task in self.tasks)

    @property
    def generator_size(self) -> int:
        """The current generator's file."""
        return 0 if self.generator is None else self.generator.size

    @property
    def start_size(self) -> int:
        """The generator's few-shot start; 0 if it has none."""
        return 0 if self.generator is None else self.generator.start_size

    @property
    def shared_size(self) -> int:
        """What all tasks share: the generator and its few-shot start."""
        return self.generator_size + self.start_size

    @property
    def per_task_size(self) -> int:
        """All codes, residuals and vectors."""
        return sum(task.size for task in self.tasks)

    @property
    def encoded(self) -> tuple[TaskBill, ...]:
        """The tasks that have a code."""
        return tuple(task for task in self.tasks if task.code_size is not None)

    @property
    def evicted(self) -> int:
        """How many tasks are evicted."""
        return sum(task.evicted for task in self.tasks)

    @property
    def short(self) -> tuple[TaskBill, ...]:
        """The tasks that keep their original because no code meets their limits."""
        return tuple(task for task in self.tasks if task.fell_short)

    @property
    def marginal_size(self) -> float | None:
        """Mean bytes of one more task: its code, residual and vectors."""
        if not self.encoded:
            return None
        return sum(task.size for task in self.encoded) / len(self.encoded)

    @property
    def break_even(self) -> int | None:
        """The number of tasks from which generator and codes are smaller than bf16; None if they never are."""
        if self.marginal_size is None:
            return None
        saved = sum(task.bf16_size for task in self.encoded) / len(self.encoded) - self.marginal_size
        return math.ceil(self.shared_size / saved) if saved > 0 else None


@dataclass(frozen=True)
class Bill:
    """The whole store."""

    usage: Usage
    fleets: tuple[BaseModelBill, ...]

    @property
    def bf16_size(self) -> int:
        """Every final adapter of the store in bfloat16."""
        return sum(fleet.bf16_size for fleet in self.fleets)

    @property
    def tasks(self) -> int:
        """How many tasks there are."""
        return sum(len(fleet.tasks) for fleet in self.fleets)

    @property
    def evicted(self) -> int:
        """How many tasks are evicted."""
        return sum(fleet.evicted for fleet in self.fleets)

    @property
    def compact_size(self) -> int:
        """Everything but originals and texts: generators, codes, residuals, vectors, database."""
        usage = self.usage
        return usage.generators + usage.codes + usage.residuals + usage.vectors + usage.database

    @property
    def is_complete(self) -> bool:
        """Whether there are tasks and every one has a code, so that the compact size covers all of them."""
        return bool(self.fleets) and all(len(fleet.encoded) == len(fleet.tasks) for fleet in self.fleets)

    @property
    def compact_share(self) -> float | None:
        """The compact size as a share of bf16 (above 1 if it is larger); None until every task has a code."""
        return self.compact_size / self.bf16_size if self.is_complete and self.bf16_size else None


def stats(context: Context, plot: Path | None = None, *, force: bool = False) -> Bill:
    """Count everything, and draw it if a file is named.

    Raises:
        DataError: The plot is not an .svg, .png or .pdf file, matplotlib is missing, or no task has a code.
        OutputExists: The file exists and `force` is not given.
    """
    if plot is None:
        return bill(context)
    from icmlora.fleet.bill_picture import check_plot, plot_bill

    check_plot(plot, force=force)
    found = bill(context)
    plot_bill(found, plot, force=force)
    return found


def bill(context: Context) -> Bill:
    """Count everything. Reads rows and file sizes, but no file's content."""
    with context.open(read_only=True) as store:
        rows = list(store.tasks.summaries())
        labels = sorted({row.task.base_model for row in rows})
        per_task = _TaskBills(store)
        fleets = []
        for label in labels:
            generator = store.generators.current(label)
            tasks = tuple(per_task.of(row, generator) for row in rows if row.task.base_model == label)
            fleets.append(BaseModelBill(label, generator, tasks))
        return Bill(store.usage(), tuple(fleets))


class _TaskBills:
    """Makes the bill of each task from rows that are read once: a query for each of a thousand tasks takes seconds."""

    def __init__(self, store: Store) -> None:
        self._vectors: defaultdict[str, set[str]] = defaultdict(set)
        self._evaluations: defaultdict[str, list[EvaluationRecord]] = defaultdict(list)
        for vector in store.vectors.all():
            self._vectors[vector.task].add(vector.blob)
        for evaluation in store.evaluations.all():
            self._evaluations[evaluation.task].append(evaluation)
        self._size = store.blobs.size

    def of(self, row: TaskSummary, generator: GeneratorRecord | None) -> TaskBill:
        code, measured = row.code, None
        if code is not None and generator is not None:
            measured = latest(self._evaluations[row.task.name], row.task, code.rung, generator)
        return TaskBill(
            task=row.task.name,
            bf16_size=_BF16 * row.final.parameters,
            original_size=row.final.stored_bytes,
            vectors_size=sum(map(self._size, self._vectors[row.task.name])),
            code_size=None if code is None else code.size,
            residual_size=None if code is None or code.residual is None else code.residual.size,
            rung=None if code is None else code.rung,
            dw_error=None if code is None else code.best_error,
            retained_gain=None if measured is None else measured.retained_gain,
            evicted=row.final.is_evicted,
            asked=None if code is None else code.asked,
        )
