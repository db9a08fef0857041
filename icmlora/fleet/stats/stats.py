"""Count what a store takes on disk, what its generators and codes save, and what they cost in quality: `icm stats`.

Sizes are those of the files. A blob that several rows share counts once in the totals, and fully in each task's line.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from icmlora.fleet.context import Context, use_case
from registry.records import CodeLimits, GeneratorRecord, TaskFigures, WithRelativeError

if TYPE_CHECKING:
    from registry.store import Store
    from registry.usage import Usage

_BF16 = 2  # bytes per parameter: what a user would otherwise keep


@dataclass(frozen=True, slots=True)
class TaskBill(WithRelativeError):
    """The bytes and the quality of one task; None where it has no code, or was not measured."""

    task: str
    bf16_size: int
    original_size: int
    vectors_size: int
    code_size: int | None
    squared_error: float | None
    retained_gain: float | None
    evicted: bool
    asked: CodeLimits | None
    original_only: str | None  # why there can be no code
    extras_bytes: int
    precision: str | None = None  # of the base model that the gain was measured on
    effect: float | None = None  # as in `NewCode`
    is_claimed: bool = False  # its figures are those that a bundle claims, so they are left out here

    @property
    def size(self) -> int:
        """Bytes of what stands for the adapter: code, vectors and extras, or an original without a code."""
        return self.codes_and_vectors_size + self.extras_bytes + (self.original_size if self.original_only else 0)

    @property
    def codes_and_vectors_size(self) -> int:
        """Bytes of code and vectors."""
        return (self.code_size or 0) + self.vectors_size

    @property
    def fell_short(self) -> bool:
        """Whether no code meets its limits, so that its original has to stay."""
        return self.asked is not None and not self.asked.is_kept and not self.evicted


@dataclass(frozen=True)
class Spread:
    """A figure over the tasks of which it was measured."""

    tasks: int
    mean: float
    worst: float
    worst_task: str
    precisions: tuple[str, ...] = ()  # of the base models that gains were measured on, sorted

    @classmethod
    def of(cls, figures: Iterable[tuple[str, float | None, str | None]], *, high_is_bad: bool = False) -> Spread | None:
        """Sum up the figures of tasks, each with the precision of its base model; None where no task has one."""
        known = [(task, value, precision) for task, value, precision in figures if value is not None]
        if not known:
            return None
        worst_task, worst, _ = min(known, key=lambda row: (-row[1] if high_is_bad else row[1], row[0]))
        precisions = {precision for *_, precision in known if precision is not None}
        mean = sum(value for _, value, _ in known) / len(known)
        return cls(len(known), mean, worst, worst_task, tuple(sorted(precisions)))


class _Sums:
    """What one base model and the whole store have in common: sums over tasks, each made once."""

    @property
    def each(self) -> Iterable[TaskBill]:
        """All tasks."""
        raise NotImplementedError

    @cached_property
    def bf16_size(self) -> int:
        """Bytes of all final adapters in bfloat16; savings are relative to this."""
        return sum(task.bf16_size for task in self.each)

    @cached_property
    def evicted(self) -> int:
        """How many tasks are evicted."""
        return sum(task.evicted for task in self.each)

    @cached_property
    def relative_errors(self) -> Spread | None:
        """The relative errors of the codes; None where none was measured."""
        return Spread.of(((task.task, task.relative_error, None) for task in self.each), high_is_bad=True)

    @cached_property
    def retained_gains(self) -> Spread | None:
        """The retained gains of the codes; None where none was measured."""
        return Spread.of((task.task, task.retained_gain, task.precision) for task in self.each)


@dataclass(frozen=True)
class BaseModelBill(_Sums):
    """The tasks of one base model."""

    base_model: str
    generator: GeneratorRecord | None
    tasks: tuple[TaskBill, ...]
    extras_bytes: int  # of all tasks; what several tasks share counts once

    @property
    def each(self) -> tuple[TaskBill, ...]:
        """All tasks."""
        return self.tasks

    @property
    def generator_size(self) -> int:
        """Bytes of the current generator's file."""
        return 0 if self.generator is None else self.generator.size

    @property
    def start_size(self) -> int:
        """Bytes of the generator's few-shot start; 0 if it has none."""
        return 0 if self.generator is None else self.generator.start_size

    @property
    def shared_size(self) -> int:
        """Bytes that all tasks share: the generator and its few-shot start."""
        return self.generator_size + self.start_size

    @cached_property
    def codes_and_vectors_size(self) -> int:
        """Bytes of all codes and vectors."""
        return sum(task.codes_and_vectors_size for task in self.tasks)

    @cached_property
    def per_task_size(self) -> int:
        """Bytes of all that stands for the adapters; what several tasks share counts once."""
        return sum(task.size - task.extras_bytes for task in self.tasks) + self.extras_bytes

    @cached_property
    def original_only(self) -> tuple[TaskBill, ...]:
        """The tasks of which there can be no code."""
        return tuple(task for task in self.tasks if task.original_only is not None)

    @property
    def is_complete(self) -> bool:
        """Whether every task has a code that can have one, so that the bill covers all of them."""
        return bool(self.encoded) and len(self.encoded) + len(self.original_only) == len(self.tasks)

    @cached_property
    def encoded(self) -> tuple[TaskBill, ...]:
        """The tasks that have a code."""
        return tuple(task for task in self.tasks if task.code_size is not None)

    @cached_property
    def short(self) -> tuple[TaskBill, ...]:
        """The tasks that keep their original because no code meets their limits."""
        return tuple(task for task in self.tasks if task.fell_short)

    @cached_property
    def marginal_size(self) -> float | None:
        """Mean bytes of one more task: its code and vectors."""
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
class Bill(_Sums):
    """The whole store."""

    usage: Usage
    fleets: tuple[BaseModelBill, ...]

    @cached_property
    def each(self) -> list[TaskBill]:
        """All tasks."""
        return [task for fleet in self.fleets for task in fleet.tasks]

    @property
    def tasks(self) -> int:
        """How many tasks there are."""
        return len(self.each)

    @property
    def compact_size(self) -> int:
        """Bytes of all that the adapters need without the originals of which there is a code."""
        usage = self.usage
        uncoded = sum(task.original_size for fleet in self.fleets for task in fleet.original_only)
        coded = usage.generators + usage.codes + usage.vectors + usage.extras
        return coded + usage.database + uncoded

    @property
    def is_complete(self) -> bool:
        """Whether there are tasks and the compact size covers all of them."""
        return bool(self.fleets) and all(fleet.is_complete for fleet in self.fleets)

    @cached_property
    def original_only(self) -> int:
        """How many tasks there are of which there can be no code."""
        return sum(len(fleet.original_only) for fleet in self.fleets)

    @property
    def compact_share(self) -> float | None:
        """The compact size as a share of bf16 (above 1 if it is larger); None until every task has a code."""
        return self.compact_size / self.bf16_size if self.is_complete and self.bf16_size else None


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
    if plot is not None:
        from icmlora.fleet.stats.bill_picture import check_plot, plot_bill

        check_plot(Path(plot), force=force)
    with context.open(read_only=True) as store:
        wrong = store.listing.wrong_rows()
        rows = store.listing.figures(without=set[int]().union(*wrong.values()))
        found = bill_of(store, rows, has_wrong_rows=bool(wrong))
    if plot is not None:
        plot_bill(found, Path(plot), force=force)
    return found


def bill_of(store: Store, rows: Iterable[TaskFigures], *, has_wrong_rows: bool) -> Bill:
    """Count everything in an open store, of which `rows` are all tasks whose figures depend on no wrong row.

    Reads rows and file sizes, but no file's content.
    """
    vectors, listed = store.listing.vector_files(), store.blobs.sizes()

    def size(digest: str) -> int:
        return listed[digest] if digest in listed else store.blobs.size(digest)  # which says what is missing

    tasks, extras = defaultdict[str, list[TaskBill]](list), defaultdict[str, dict[str, int]](dict)
    for row in rows:
        tasks[row.base_model].append(_task_bill(row, sum(map(size, vectors.get(row.id, ())))))
        extras[row.base_model].update((extra.blob, extra.packed_size) for extra in row.extras)
    fleets = [
        BaseModelBill(label, store.listing.generator(label), tuple(own), sum(extras[label].values()))
        for label, own in sorted(tasks.items())
    ]
    return Bill(store.usage(listed, has_wrong_rows=has_wrong_rows), tuple(fleets))


def _task_bill(row: TaskFigures, vectors_size: int) -> TaskBill:
    return TaskBill(
        task=row.task,
        bf16_size=_BF16 * row.parameters + sum(extra.size for extra in row.extras if extra.file is None),
        original_size=row.stored_bytes,
        vectors_size=vectors_size,
        code_size=row.code_size,
        squared_error=row.squared_error,
        retained_gain=row.gain,
        precision=row.gain_precision,
        evicted=row.is_evicted,
        asked=row.asked,
        original_only=row.original_only,
        extras_bytes=sum(extra.packed_size for extra in row.extras),
        is_claimed=row.is_claimed,
        effect=row.effect,
    )
