"""What is in the store: names, and the list of tasks. Never imports torch."""

from __future__ import annotations

from icm_cli.workflows.chosen import check_base_model
from icm_cli.workflows.opening import Place
from registry.records import TaskSummary


def task_names(place: Place) -> list[str]:
    """Return the names of all tasks."""
    with place.open(read_only=True) as store:
        return [task.name for task in store.tasks()]


def base_names(place: Place) -> list[str]:
    """Return the names of all base models."""
    with place.open(read_only=True) as store:
        return [base.name for base in store.base_models()]


def list_tasks(place: Place, base_model: str | None = None) -> list[TaskSummary]:
    """Return all tasks by name, or those of one base model.

    Raises:
        DataError: No task belongs to the base model.
    """
    with place.open(read_only=True) as store:
        rows = list(store.summaries())
    check_base_model(base_model, {row.task.base_model for row in rows})
    return [row for row in rows if base_model in (None, row.task.base_model)]
