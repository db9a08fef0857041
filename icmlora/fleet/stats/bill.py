"""What a store takes on disk, task by task: the bill that `icm stats` shows and draws."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from registry.records import CodeLimits, GeneratorRecord, WithRelativeError

if TYPE_CHECKING:
    from registry.usage import Usage


@dataclass(frozen=True)
class TaskBill(WithRelativeError):
    """The bytes and the quality of one task; None where it has no code, or was not measured."""

    task: str
    bf16_size: int
    original_size: int
    vectors_size: int
    code_size: int | None
    residual_size: int | None
    rung: Literal["residual", "code"] | None
    squared_error: float | None
    retained_gain: float | None
    evicted: bool
    asked: CodeLimits | None
    original_only: str | None  # why there can be no code
    extras_bytes: int
    precision: str | None = None  # of the base model that the gain was measured on
    is_claimed: bool = False  # its figures are those that a bundle claims, so they are left out here

    @property
    def size(self) -> int:
        """Bytes of what stands for the adapter: code, residual, vectors and extras, or an original without a code."""
        return self.codes_and_vectors_size + self.extras_bytes + (self.original_size if self.original_only else 0)

    @property
    def codes_and_vectors_size(self) -> int:
        """Bytes of code, residual and vectors."""
        return (self.code_size or 0) + (self.residual_size or 0) + self.vectors_size

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


@dataclass(frozen=True)
class BaseModelBill:
    """The tasks of one base model."""

    base_model: str
    generator: GeneratorRecord | None
    tasks: tuple[TaskBill, ...]
    extras_bytes: int  # of all tasks; what several tasks share counts once

    @property
    def bf16_size(self) -> int:
        """Bytes of all final adapters in bfloat16; savings are relative to this."""
        return sum(task.bf16_size for task in self.tasks)

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

    @property
    def codes_and_vectors_size(self) -> int:
        """Bytes of all codes, residuals and vectors."""
        return sum(task.codes_and_vectors_size for task in self.tasks)

    @property
    def per_task_size(self) -> int:
        """Bytes of all that stands for the adapters; what several tasks share counts once."""
        return sum(task.size - task.extras_bytes for task in self.tasks) + self.extras_bytes

    @property
    def original_only(self) -> tuple[TaskBill, ...]:
        """The tasks of which there can be no code."""
        return tuple(task for task in self.tasks if task.original_only is not None)

    @property
    def relative_errors(self) -> Spread | None:
        """The relative errors of the codes with their residuals; None where none was measured."""
        return _errors(self.tasks)

    @property
    def retained_gains(self) -> Spread | None:
        """The retained gains of the codes with their residuals; None where none was measured."""
        return _gains(self.tasks)

    @property
    def is_complete(self) -> bool:
        """Whether every task has a code that can have one, so that the bill covers all of them."""
        return bool(self.encoded) and len(self.encoded) + len(self.original_only) == len(self.tasks)

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
        """Bytes of all final adapters of the store in bfloat16."""
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
    def relative_errors(self) -> Spread | None:
        """The relative errors of all codes with their residuals; None where none was measured."""
        return _errors([task for fleet in self.fleets for task in fleet.tasks])

    @property
    def retained_gains(self) -> Spread | None:
        """The retained gains of all codes with their residuals; None where none was measured."""
        return _gains([task for fleet in self.fleets for task in fleet.tasks])

    @property
    def compact_size(self) -> int:
        """Bytes of all that the adapters need without the originals of which there is a code."""
        usage = self.usage
        uncoded = sum(task.original_size for fleet in self.fleets for task in fleet.original_only)
        coded = usage.generators + usage.codes + usage.residuals + usage.vectors + usage.extras
        return coded + usage.database + uncoded

    @property
    def is_complete(self) -> bool:
        """Whether there are tasks and the compact size covers all of them."""
        return bool(self.fleets) and all(fleet.is_complete for fleet in self.fleets)

    @property
    def original_only(self) -> int:
        """How many tasks there are of which there can be no code."""
        return sum(len(fleet.original_only) for fleet in self.fleets)

    @property
    def compact_share(self) -> float | None:
        """The compact size as a share of bf16 (above 1 if it is larger); None until every task has a code."""
        return self.compact_size / self.bf16_size if self.is_complete and self.bf16_size else None


def _errors(tasks: Sequence[TaskBill]) -> Spread | None:
    known = {task.task: task.relative_error for task in tasks if task.relative_error is not None}
    return _spread(known, max(known, key=known.__getitem__)) if known else None


def _gains(tasks: Sequence[TaskBill]) -> Spread | None:
    known = {task.task: task.retained_gain for task in tasks if task.retained_gain is not None}
    if not known:
        return None
    measured = {task.precision for task in tasks if task.retained_gain is not None and task.precision is not None}
    return replace(_spread(known, min(known, key=known.__getitem__)), precisions=tuple(sorted(measured)))


def _spread(values: Mapping[str, float], worst: str) -> Spread:
    return Spread(len(values), sum(values.values()) / len(values), values[worst], worst)
