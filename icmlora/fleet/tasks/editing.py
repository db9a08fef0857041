"""Edit and remove tasks. Imports no torch."""

from __future__ import annotations

import unicodedata
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Literal

from icmlora.errors import DataError
from icmlora.fleet.context import Context, use_case
from icmlora.fleet.evict.placeholders import Placeholders
from icmlora.fleet.params import NamedTasks, Param
from registry.errors import LastCopy, LostRace, TaskConflict
from registry.manifests import Task
from registry.names import check_name, check_note, check_tag

if TYPE_CHECKING:
    from registry.store import Store


@dataclass(frozen=True)
class EditReport:
    """The edited tasks."""

    tasks: list[Task]  # as they are now, each once
    evicted: list[str]  # their originals were evicted, so pinning them keeps nothing


@dataclass(frozen=True)
class Removal:
    """The files that are deleted with a task."""

    name: str
    versions: int
    adapters: int
    size: int  # bytes of their files; other tasks may share some of them
    is_last_copy: bool  # whether an original was evicted, so that its code is the only copy
    placeholders: int = 0  # placeholders in the folders of its adapters, which could not be restored any more


@dataclass(frozen=True)
class RemoveReport:
    """The tasks that were removed."""

    tasks: list[str]
    freed: int | None  # bytes; None if another process uses the store, so that the next `prune` frees them


@use_case
def edit_tasks(
    context: Context,
    tasks: NamedTasks,
    *,
    name: Annotated[str | None, Param("New name. For a single task.", "--name NEW")] = None,
    add_tags: Annotated[Sequence[str], Param("Tag to add. Can be repeated.", "--tag TAG", completes="tag")] = (),
    remove_tags: Annotated[
        Sequence[str], Param("Tag to remove. Can be repeated.", "--untag TAG", completes="tag")
    ] = (),
    note: str | Literal[False] | None = None,
    pinned: Annotated[bool | None, Param("Protect the originals from `icm evict`.", "--pin/--no-pin")] = None,
) -> EditReport:
    """Change the name, tags, note or pin of tasks.

    Without options, the current values are printed. A name may contain letters and digits of any script, ".", "_" and
    "-". Existing bundles and folders keep the old name. `icm evict` never deletes a pinned original. Either all changes
    are made or none.

    Example:
      icm edit lora-final-v2 --name poems
      icm edit poems rules --tag prod --untag trial --pin

    Raises:
        DataError: A tag is both added and removed, or the name is for several tasks.
        TaskConflict: Another task has the name.
        InvalidName: The name, a tag or the note breaks its rule.
    """
    # In Python, a note of False removes the note.
    if both := {tag.lower() for tag in add_tags} & {tag.lower() for tag in remove_tags}:
        raise DataError(f"tag {min(both)!r} is both added and removed", hint="specify it once")
    if name is not None and len({task.lower() for task in tasks}) > 1:
        raise DataError(f"{len(tasks)} tasks cannot all be named {name!r}", hint="specify one task")
    name = None if name is None else check_name(unicodedata.normalize("NFC", name))
    text = check_note(note) if isinstance(note, str) else None
    wanted, unwanted = {tag.lower(): check_tag(tag) for tag in add_tags}, {tag.lower() for tag in remove_tags}

    def edited(task: Task) -> Task:
        tags = wanted | {tag.lower(): tag for tag in task.tags}  # a tag that is there keeps its spelling
        return replace(
            task,
            tags=tuple(tags[tag] for tag in sorted(tags.keys() - unwanted)),
            note=task.note if note is None else text,
            pinned=task.pinned if pinned is None else pinned,
        )

    is_change = bool(add_tags or remove_tags) or any(value is not None for value in (name, note, pinned))
    with context.open(read_only=not is_change) as store:
        while True:
            found = list({task.name: task for task in map(store.task, tasks)}.values())
            done = [edited(task) for task in found] if is_change else found
            try:
                if name is not None and name != done[0].name:
                    done = [_renamed(store, done[0], name)]
                elif changed := [new for new, task in zip(done, found, strict=True) if new != task]:
                    store.publish(changed, older=any("@" in task for task in tasks))
            except LostRace:
                continue
            return EditReport(done, [task.name for task in done if task.final.is_evicted])


def _renamed(store: Store, task: Task, name: str) -> Task:
    """Publish all versions of a task under another name, and return the given one."""
    other = store.find(name)
    is_same = other is not None and other.name == task.name
    if other is not None and not is_same:
        raise TaskConflict(other.name, fact=f"there is already a task named {other.name!r}", choices=None)
    current = store.task(task.name)
    versions = [task if one.version == task.version else one for one in store.history(task.name)]
    new = [replace(one, name=name, manifest=one.manifest if is_same else None) for one in versions]
    published = store.publish(new, remove=[] if is_same else [current], older=True)
    return next(one for one in published if one.version == task.version)


@use_case
def plan_removal(context: Context, tasks: Sequence[str]) -> list[Removal]:
    """Return what `remove` would delete with these `tasks`; nothing changes."""
    planned: list[Removal] = []
    with context.open(read_only=True) as store:
        folders = Placeholders(store, dry_run=True)
        for name in dict.fromkeys(_task_to_remove(store, name).name for name in tasks):
            versions = store.history(name)
            adapters = [adapter for version in versions for adapter in version.adapters]
            files = {(one.weights, one.config): one for one in adapters}.values()
            size, left = sum(one.stored_bytes for one in files), sum(map(folders.has_left, files))
            is_last_copy = any(version.final.is_evicted for version in versions)
            planned.append(Removal(name, len(versions), len(adapters), size, is_last_copy, left))
    return planned


@use_case
def remove_tasks(context: Context, tasks: NamedTasks, *, last_copies: Collection[str] = ()) -> RemoveReport:
    """Remove tasks with all versions of their adapters, vectors, codes and measurements.

    If any name is unknown, nothing is removed. Files that no other task needs are deleted; if another icm process is
    running, by the next `icm prune`. Removing an evicted task removes the last copy of its adapter, and its
    placeholders can no longer be restored.

    Example:
      icm rm shakespeare --dry-run

    Raises:
        LastCopy: A task is evicted and not in `last_copies`: its code is the only copy.
    """
    allowed = {name.lower() for name in last_copies}
    with context.open() as store:
        found = list({task.name: task for task in (_task_to_remove(store, name) for name in tasks)}.values())
        for task in found:
            is_last_copy = any(version.final.is_evicted for version in store.history(task.name))
            if is_last_copy and task.name.lower() not in allowed:
                fact = f"task {task.name!r} was evicted: its code is the only copy"
                raise LastCopy(fact, hint="run the same command again to remove it anyway")
        store.remove(found)
        names = [task.name for task in found]
        return RemoveReport(names, store.free(names=names))


def _task_to_remove(store: Store, name: str) -> Task:
    if "@" in name:
        raise DataError(
            f"a single version such as {name!r} cannot be removed", hint="run `icm rm TASK` to remove all versions"
        )
    return store.task(name)
