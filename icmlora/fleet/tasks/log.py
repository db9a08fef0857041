"""List the versions of a task, oldest first; the last one has the aliases: `icm log`."""

from __future__ import annotations

from icmlora.fleet.context import Context, use_case
from icmlora.fleet.params import TaskName
from registry.manifests import File, Task


@use_case
def list_versions(context: Context, task: TaskName) -> list[Task]:
    """List the versions of a task, newest first.

    ORIGINAL: size of the adapter as ingested. STORED: size of the version's files in the store; versions may share
    some of them. KEPT: the original, the code and the checkpoints that are in the store. TASK@2 or TASK@ALIAS names a
    version in other commands.

    Example:
      icm log shakespeare
      icm show shakespeare@1
    """
    with context.open(read_only=True) as store:
        return store.history(task)


def stored_files(task: Task) -> frozenset[File]:
    """Return the files of a version that are in the store, without the generator of its code."""
    files: list[File | None] = [task.samples, task.eval_data, *(vector.blob for vector in task.vectors)]
    for adapter in task.adapters:
        files += [adapter.config, adapter.card, *(extra.blob for extra in adapter.extras)]
        files += [] if adapter.is_evicted else adapter.evictable
    return frozenset(file for file in [*files, None if task.code is None else task.code.blob] if file is not None)
