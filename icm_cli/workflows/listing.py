"""What is in the store: names, the list of tasks, everything about one task. Never imports torch."""

from __future__ import annotations

from dataclasses import dataclass

from icm_cli.workflows.opening import Place
from registry.records import (
    AdapterRecord,
    CodeRecord,
    EvaluationRecord,
    GeneratorRecord,
    TaskRecord,
    TaskSummary,
    VectorRecord,
)


@dataclass(frozen=True)
class TaskDetails:
    """Everything that the store knows of a task.

    Attributes:
        adapters: Checkpoints by step, the final adapter last.
        generator: The current generator of its base model, if there is one.
        code: Its code under that generator, if it has one.
        evaluations: All measurements, latest of each kind.
    """

    task: TaskRecord
    adapters: tuple[AdapterRecord, ...]
    vectors: tuple[VectorRecord, ...]
    generator: GeneratorRecord | None
    code: CodeRecord | None
    evaluations: tuple[EvaluationRecord, ...]

    @property
    def final(self) -> AdapterRecord:
        """The adapter that stands for the task."""
        return next(adapter for adapter in self.adapters if adapter.is_final)


def task_names(place: Place) -> list[str]:
    """Return the names of all tasks."""
    with place.open(read_only=True) as store:
        return [task.name for task in store.tasks()]


def base_names(place: Place) -> list[str]:
    """Return the names of all base models."""
    with place.open(read_only=True) as store:
        return [base.name for base in store.base_models()]


def list_tasks(place: Place, base_model: str | None = None) -> list[TaskSummary]:
    """Return all tasks by name, or those of one base model."""
    with place.open(read_only=True) as store:
        return [row for row in store.summaries() if base_model in (None, row.task.base_model)]


def describe_task(place: Place, name: str) -> TaskDetails:
    """Return everything about one task.

    Raises:
        TaskNotFound: There is no such task; the error names the closest ones.
    """
    with place.open(read_only=True) as store:
        task = store.task(name)
        generator = store.current_generator(task.base_model)
        return TaskDetails(
            task=task,
            adapters=tuple(store.adapters(task.name)),
            vectors=tuple(store.vectors(task.name)),
            generator=generator,
            code=None if generator is None else store.code(task.name, generator.id),
            evaluations=tuple(store.evaluations(task.name)),
        )
