"""Read the texts of a task as its base model reads them. Never imports torch.

Chats are rendered with the chat template of the task's adapter, if it has one, or else with the base model's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from icmlora.base_models.examples.adapter_template import template_of
from icmlora.base_models.examples.chat_template import Templates
from icmlora.base_models.examples.examples import Examples
from icmlora.base_models.reading import EvaluationData, examples_for
from icmlora.fleet.resources.adapter_row import read_companions

if TYPE_CHECKING:
    from icmlora.base_models.examples.context import TaskContext
    from icmlora.base_models.modality import BaseModel
    from registry.manifests import Task
    from registry.store import Store


def read_samples(store: Store, task: Task, base: BaseModel, most: int | None = None) -> Examples | None:
    """Return a task's samples, at most `most` of them; None if it has none."""
    if task.samples is None:
        return None
    return examples_for(base, store.blobs.read(task.samples), most=most, template=adapter_template(store, task))


def own_text(store: Store, task: Task, base: BaseModel, context: TaskContext | None = None) -> EvaluationData:
    """Return the held-out text of a task that has some, after a context if there is one."""
    template, data = adapter_template(store, task), store.blobs.read(str(task.eval_data))
    return EvaluationData.parse(data, base=base, path=task.name, template=template, context=context)


def adapter_template(store: Store, task: Task) -> Templates | None:
    """Return the chat template of a task's adapter."""
    return template_of(read_companions(store.blobs.read, task.final))
