"""The bill: bytes and quality of each task, summed up for each base model and for the whole store."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from icmlora.fleet.rows import limits_of
from registry.manifests import CodeLimits, Generator, relative_error

if TYPE_CHECKING:
    from registry.tables import TaskRow
    from registry.usage import Usage


@dataclass(frozen=True)
class TaskBill:
    """The bytes and the quality of one task."""

    row: TaskRow
    bf16_size: int  # of its final adapter, with the tensors that no code can represent as they were

    @property
    def size(self) -> int:
        """Bytes that replace the adapter: code, vectors and extras, or an original that cannot have a code."""
        original = 0 if self.row.original_only is None else self.row.stored_bytes
        return self.codes_and_vectors_size + self.row.extras_bytes + original

    @property
    def codes_and_vectors_size(self) -> int:
        """Bytes of code and vectors."""
        return (self.row.code_size or 0) + self.row.vectors_bytes

    @property
    def relative_error(self) -> float | None:
        """The relative error of its code."""
        return relative_error(self.row.squared_error)

    @property
    def limits(self) -> CodeLimits | None:
        """The limits that its code was made for."""
        return limits_of(self.row)

    @property
    def misses_limit(self) -> bool:
        """Whether no code meets its limits, so that its original is kept."""
        return self.limits is not None and not self.limits.is_kept and self.row.evicted_at is None


@dataclass(frozen=True)
class Spread:
    """A figure over the tasks with a measurement."""

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
    """Sums over tasks, for one base model and for the whole store."""

    @property
    def each(self) -> Sequence[TaskBill]:
        """All tasks."""
        raise NotImplementedError

    @cached_property
    def bf16_size(self) -> int:
        """Bytes of all final adapters in bfloat16; savings are relative to this."""
        return sum(task.bf16_size for task in self.each)

    @cached_property
    def evicted(self) -> int:
        """Number of evicted tasks."""
        return sum(task.row.evicted_at is not None for task in self.each)

    @cached_property
    def original_only(self) -> int:
        """Number of tasks that cannot have a code."""
        return sum(task.row.original_only is not None for task in self.each)

    @cached_property
    def encoded(self) -> tuple[TaskBill, ...]:
        """The tasks that have a code."""
        return tuple(task for task in self.each if task.row.is_coded)

    @cached_property
    def missed_limits(self) -> list[CodeLimits]:
        """The limits of each task that keeps its original because no code meets them."""
        return [task.limits for task in self.each if task.limits is not None and task.misses_limit]

    @cached_property
    def relative_errors(self) -> Spread | None:
        """The relative errors of the codes; None if none was measured."""
        return Spread.of(((task.row.name, task.relative_error, None) for task in self.each), high_is_bad=True)

    @cached_property
    def retained_gains(self) -> Spread | None:
        """The retained gains of the codes; None if none was measured."""
        return Spread.of((task.row.name, task.row.gain, task.row.gain_precision) for task in self.each)


@dataclass(frozen=True)
class BaseModelBill(_Sums):
    """The tasks of one base model."""

    base_model: str
    generator: Generator | None  # the current one
    tasks: tuple[TaskBill, ...]
    extras_bytes: int  # of all tasks; an extra that several tasks share counts once
    earlier_size: int = 0  # bytes of earlier generators that codes need

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
        """Bytes that all tasks share: the generators that their codes need, and the few-shot start."""
        return self.generator_size + self.start_size + self.earlier_size

    @property
    def is_complete(self) -> bool:
        """Whether every task that can have a code has one, so that the sizes cover all of them."""
        return bool(self.encoded) and len(self.encoded) + self.original_only == len(self.tasks)

    @cached_property
    def codes_and_vectors_size(self) -> int:
        """Bytes of all codes and vectors."""
        return sum(task.codes_and_vectors_size for task in self.tasks)

    @cached_property
    def per_task_size(self) -> int:
        """Bytes of everything that replaces the adapters; an extra that several tasks share counts once."""
        return sum(task.size - task.row.extras_bytes for task in self.tasks) + self.extras_bytes

    @cached_property
    def marginal_size(self) -> float | None:
        """Mean bytes of one more task: its code, vectors and extras."""
        return sum(task.size for task in self.encoded) / len(self.encoded) if self.encoded else None

    @property
    def break_even(self) -> int | None:
        """The smallest number of tasks with generator and codes smaller than bf16; None if there is none."""
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
        """Number of tasks."""
        return len(self.each)

    @property
    def is_complete(self) -> bool:
        """Whether there are tasks and the compact size covers all of them."""
        return bool(self.fleets) and all(fleet.is_complete for fleet in self.fleets)

    @property
    def compact_size(self) -> int:
        """Bytes that the adapters need without the originals that have a code."""
        usage = self.usage
        coded = sum(fleet.shared_size for fleet in self.fleets) + usage.codes + usage.vectors + usage.extras
        uncoded = sum(task.row.stored_bytes for task in self.each if task.row.original_only is not None)
        return coded + uncoded + usage.manifests + usage.database

    @property
    def compact_share(self) -> float | None:
        """The compact size as a share of bf16 (above 1 if it is larger); None until every task has a code."""
        return self.compact_size / self.bf16_size if self.is_complete and self.bf16_size else None
