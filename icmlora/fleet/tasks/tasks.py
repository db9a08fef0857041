"""List, show, edit and remove tasks. Imports neither torch nor, for a listing, numpy."""

from __future__ import annotations

import unicodedata
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, Literal

from icmlora.base_models.examples.chat_template import ChatTemplate
from icmlora.errors import DataError, IcmLoraError
from icmlora.fleet.context import Context, base_name, check_base_model, use_case
from icmlora.fleet.evict.placeholders import Placeholders
from icmlora.fleet.params import BaseModelName, Filters, Limit, NamedTasks, Param, Sort, TaskName
from icmlora.formats.catalogue import format_named
from icmlora.formats.file_header import HEADER
from icmlora.formats.tensor_hash import same_tensors, tensors_digest
from icmlora.io.safetensors import peek_bytes
from icmlora.io.strict_json import parse_object
from registry.errors import DamagedStore, GeneratorNotFound, LastCopy, LostRace, TaskConflict
from registry.filters import FIELDS, FilterField, Selection, parse_filter, parse_sort
from registry.manifests import Generator, Task
from registry.names import check_name, check_note, check_tag

if TYPE_CHECKING:
    from icmlora.generator.initial_a.draw import InitialA
    from icmlora.task_vectors.distances import Neighbour
    from registry.store import Store
    from registry.tables import TaskRow


@dataclass(frozen=True)
class TaskDetails:
    """A task, and what follows from its files and from the other tasks."""

    task: Task
    generator: Generator | None  # that decodes its code
    nearest: tuple[Neighbour, ...]
    initial: InitialA | None
    # Digest of the chat template that its chats were read with when they were last read, and whether it came with the
    # adapter; None if no chats were read.
    template: str | None
    has_own_template: bool
    header: Mapping[str, str]  # written by the trainer into the file of an image adapter
    same_as_final: tuple[bool, ...]  # for each checkpoint, whether its tensors equal the final adapter's


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


def filter_fields() -> Collection[FilterField]:
    """Return the fields that tasks can be filtered and sorted by."""
    return FIELDS.values()


@use_case
def list_tasks(
    context: Context,
    base_model: BaseModelName = None,
    *,
    filters: Filters = (),
    sort: Sort = None,
    limit: Limit = None,
) -> list[TaskRow]:
    """List the tasks in the store, or in a bundle with --from.

    ORIGINAL: size of the original; "evicted" if it was deleted, "none" if a bundle brought only the code.
    CODE: size of the code; "-" if there is none yet (run `icm train`), "original only" if there cannot be one
    (`icm show` gives the reason). GAIN and RELATIVE ERROR: measured quality of the code. A narrow terminal shows fewer
    columns. --quiet prints only names.

    A filter is FIELD, an operator (= != > >= < <= or ~ for contains) and a value; case does not matter. Fields: name,
    base, rank, size, code, extras, gain, error, tag, source, note, and status (evicted, pinned, coded, original-only,
    does-nothing, generated). Sizes take units: 10MB, 512KiB.

    Example:
      icm ls -F 'rank>=8' -F tag=prod -F 'base~llama' --sort size:desc --limit 20

    Raises:
        DataError: No task belongs to the base model.
        InvalidFilter: A filter or the order cannot be understood; the hint lists the fields.
    """
    selection = _selection(base_model, filters, sort, limit)
    with context.open(read_only=True) as store:
        return list(store.rows(of_base_model(store, selection)))


@use_case
def count_tasks(context: Context, base_model: str | None = None, *, filters: Sequence[str] = ()) -> int:
    """Return how many tasks `list_tasks` lists."""
    selection = _selection(base_model, filters)
    with context.open(read_only=True) as store:
        return store.count(of_base_model(store, selection))


def _selection(
    base_model: str | None, filters: Sequence[str], sort: str | None = None, limit: int | None = None
) -> Selection:
    """Read the filters and the order; raise `DataError` or `InvalidFilter`."""
    if limit is not None and limit < 1:
        raise DataError(f"a limit of {limit} tasks lists nothing", hint="use 1 or more")
    order = None if sort is None else parse_sort(sort)
    return Selection(base_model, tuple(map(parse_filter, filters)), order, limit)


def of_base_model(store: Store, selection: Selection) -> Selection:
    """Replace the label of a selection's base model by its name; raise `DataError` if it has no tasks."""
    base_model = base_name(store, selection.base_model)
    if base_model is not None:
        check_base_model(base_model, store.task_counts())
    return replace(selection, base_model=base_model)


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
def list_tags(context: Context) -> Mapping[str, int]:
    """Return how many tasks have each tag, sorted by tag."""
    with context.open(read_only=True) as store:
        return store.tags()


@use_case
def show_task(context: Context, task: TaskName) -> TaskDetails:
    """Show one task: its adapters, vectors, code and measured quality.

    TASK@2 or TASK@ALIAS shows one of its versions; `icm log` lists them. The nearest tasks have the smallest cosine
    distance between task vectors. `icm map` compares all tasks.

    Example:
      icm show shakespeare
      icm show shakespeare@2
      icm show watercolour --errors
    """
    from icmlora.fleet.map.task_map import nearest_tasks

    with context.open(read_only=True) as store:
        known = store.task(task)
        try:
            code = known.code
            generator = None if code is None else store.generator_of(code.generator, known.base_model)
        except (DamagedStore, GeneratorNotFound):  # `icm verify` reports it
            generator = None
        # The template that was used last.
        facts = [*(one.settings for one in reversed(known.measured)), *(v.extractor for v in reversed(known.vectors))]
        template = next((str(settings["template"]) for settings in facts if "template" in settings), None)

        def digest(blob: str) -> str | None:
            try:
                return tensors_digest(store.blobs.read(blob))
            except DamagedStore:  # evicted, or `icm verify` reports it
                return None

        return TaskDetails(
            task=known,
            generator=generator,
            nearest=nearest_tasks(context, store, known),
            initial=None if generator is None else _initial(store, known),
            template=template,
            has_own_template=template is not None and template == _own_template(store, known),
            header=header_of(store, known),
            # Files are read only if their keys are equal.
            same_as_final=tuple(same_tensors(one, known.final, digest) for one in known.checkpoints),
        )


def header_of(store: Store, task: Task) -> Mapping[str, str]:
    """Return the notes of the trainer in the header of an image adapter; none for another kind."""
    final = task.final
    if not format_named(final.format).is_for_images:
        return {}
    from icmlora.fleet.resources.decoding import base_tensors
    from icmlora.formats.extras import unpack_tensors

    try:
        if not final.is_evicted:
            found = peek_bytes(partial(store.blobs.start, final.weights))
            return {} if found is None else found.metadata
        blobs = [store.blobs.read(extra.blob) for extra in final.extras if extra.file is None]
        header = unpack_tensors(blobs, partial(base_tensors, store, task)).get(HEADER)
        return {} if header is None else parse_object(header.data, what="the header", max_bytes=len(header.data))
    except (DamagedStore, IcmLoraError):  # `icm verify` reports it
        return {}


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


def _own_template(store: Store, task: Task) -> str | None:
    from icmlora.fleet.resources.texts import adapter_template

    try:
        own = adapter_template(store, task)
    except (DamagedStore, IcmLoraError):
        return None
    return None if own is None else ChatTemplate(own, {}).digest


def _initial(store: Store, task: Task) -> InitialA | None:
    """Read the initialisation seed from a task's code; None if a file is damaged, which `icm verify` reports."""
    from icmlora.generator.codec.code import ParsedCode, generator_of
    from icmlora.generator.files.file import versions_of

    assert task.code is not None
    try:
        data, versions = store.blobs.read(task.code.blob), versions_of(store.blobs.read(task.code.generator))
        config = next((version.config for version in versions if version.digest == generator_of(data)), None)
        return None if config is None else ParsedCode.from_bytes(data, config).head.initial
    except (DamagedStore, IcmLoraError):
        return None
