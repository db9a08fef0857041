"""Which tasks a command works on, and their texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from icmlora.examples import parse_examples
from registry.records import TaskRecord

if TYPE_CHECKING:
    from registry.store import Store


def chosen_tasks(store: Store, names: Sequence[str]) -> list[TaskRecord]:
    """Return some tasks, or all, each once, those of one base model together.

    Raises:
        TaskNotFound: A name is not in the store.
    """
    tasks = [store.task(name) for name in names] or list(store.tasks())
    return sorted({task.name: task for task in tasks}.values(), key=lambda task: (task.base_model, task.name))


def sample_texts(store: Store, task: TaskRecord) -> list[str] | None:
    """Return a task's samples, or None where it has none.

    Raises:
        DataError: They cannot be used.
    """
    if task.samples is None:
        return None
    return [example.text for example in parse_examples(store.read_blob(task.samples))]
