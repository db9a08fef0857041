"""Which tasks a command works on, and their texts."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from icmlora.errors import DataError
from icmlora.examples import parse_examples
from registry.records import TaskRecord

if TYPE_CHECKING:
    from registry.store import Store


def chosen_tasks(store: Store, names: Sequence[str], base_model: str | None = None) -> list[TaskRecord]:
    """Return some tasks, or all, each once, those of one base model together.

    Args:
        store: The open store.
        names: Tasks; all if empty.
        base_model: Leave out the tasks of others.

    Raises:
        TaskNotFound: A name is not in the store.
        DataError: No task, or none of those that are named, belongs to the base model.
    """
    tasks = [store.task(name) for name in names] or list(store.tasks())
    check_base_model(base_model, {task.base_model for task in tasks}, named=bool(names))
    chosen = {task.name: task for task in tasks if base_model in (None, task.base_model)}
    return sorted(chosen.values(), key=lambda task: (task.base_model, task.name))


def check_base_model(base_model: str | None, known: Collection[str], *, named: bool = False) -> None:
    """Check that some task belongs to the base model that is asked for, if one is.

    Args:
        base_model: What is asked for.
        known: The base models of all tasks, or of those that are named.
        named: Whether tasks are named.

    Raises:
        DataError: None does.
    """
    if base_model is not None and base_model not in known:
        none = "none of these tasks" if named else "no task"
        raise DataError(f"{none} belongs to base model {base_model!r}", hint="`icm base ls` lists the base models")


def sample_texts(store: Store, task: TaskRecord) -> list[str] | None:
    """Return a task's samples, or None where it has none.

    Raises:
        DataError: They cannot be used.
    """
    if task.samples is None:
        return None
    return [example.text for example in parse_examples(store.read_blob(task.samples))]
