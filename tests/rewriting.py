"""The copy of a store whose adapters came from another folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from registry.manifests import StoredAdapter, Task
from registry.store import Store


def moved(store: Path, before: Path, after: Path) -> Path:
    """Let the copy of a store say that it ingested its adapters from the folder `after`, not from `before`."""

    def elsewhere(adapter: StoredAdapter) -> StoredAdapter:
        return replace(adapter, source=adapter.source.replace(str(before), str(after)))

    def change(task: Task) -> Task:
        return replace(task, final=elsewhere(task.final), checkpoints=tuple(map(elsewhere, task.checkpoints)))

    with Store.open(store) as opened:
        opened.publish([change(task) for task in opened.tasks()])
    return store
