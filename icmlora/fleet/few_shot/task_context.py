"""Choose, show and remove the context of a task: `icm context`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from icmlora.fleet.context import Context, use_case
from icmlora.fleet.few_shot.generated import MAX_CONTEXT_TOKENS, MAX_SAMPLES, ContextReport
from icmlora.fleet.params import Device, Param, TaskName
from icmlora.formats.peft.peft import CONTEXT_NAMES

if TYPE_CHECKING:
    from icmlora.base_models.examples.context import TaskContext


@use_case
def set_context(
    context: Context,
    task: TaskName,
    *,
    samples: Annotated[
        str | Path | None,
        Param("Samples in the format of `icm generate`. Default: the samples stored with the task.", "--samples FILE"),
    ] = None,
    count: Annotated[
        int, Param("Choose from at most K samples, evenly spaced in the file.", "--count K", min=1)
    ] = MAX_SAMPLES,
    tokens: Annotated[
        int, Param("Maximum length of the context in tokens.", "--tokens N", min=16)
    ] = MAX_CONTEXT_TOKENS,
    device: Device = "auto",
) -> ContextReport:
    """Choose example samples to place at the start of every prompt.

    A few samples in the prompt often improve results, with or without an adapter. By default, as many samples as fit
    are used. Longer, shorter or fewer samples are chosen if they score better on the other samples. The context is
    stored with the adapter. `icm materialize` writes it to context.txt and, for chats, context.json. `icm serve` adds
    it to requests that ask for it. Needs the base model.

    Example:
      icm context shakespeare --samples plays.jsonl
      icm context shakespeare --show

    Raises:
        DataError: There are no samples, they are not text, or none is short enough.
        BaseModelUnsuited: The base model is no causal language model.
        BaseModelNotFound: It is not on this machine.
    """
    from icmlora.fleet.few_shot.context_choice import choose  # imports torch

    return choose(context, task, None if samples is None else Path(samples), count, tokens, device)


@use_case
def remove_context(context: Context, task: TaskName) -> bool:
    """Remove the context of a task; return whether it had one."""
    from icmlora.fleet.few_shot.context_choice import with_files  # imports torch

    with context.open() as store:
        had = any(extra.file in CONTEXT_NAMES for extra in store.task(task).final.extras)
        store.update(task, partial(with_files, files=()))
    return had


@use_case
def task_context(context: Context, task: TaskName) -> TaskContext | None:
    """Return the context of a task, or None; raise `DataError` if its files cannot be read as one."""
    from icmlora.fleet.resources.decoding import read_context  # imports torch

    with context.open(read_only=True) as store:
        return read_context(store.blobs.read, store.task(task).final)
