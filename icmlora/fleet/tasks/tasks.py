"""List, show, rename, tag and remove tasks. Imports neither torch nor, for a listing, numpy."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from icmlora.errors import DataError, IcmLoraError
from icmlora.fleet.context import Context, base_name, check_base_model
from icmlora.formats.catalogue import format_named
from icmlora.io.strict_json import parse_object
from registry.errors import DamagedStore
from registry.filters import FIELDS, Field, Selection, parse_filter, parse_sort
from registry.records import (
    AdapterRecord,
    CodeRecord,
    EvaluationRecord,
    GeneratorRecord,
    TaskRecord,
    TaskSummary,
    VectorRecord,
)

if TYPE_CHECKING:
    from icmlora.generator.initial_a.draw import InitialA
    from icmlora.task_vectors.distances import Neighbour
    from registry.store import Store


@dataclass(frozen=True)
class TaskDetails:
    """Everything that the store knows about a task."""

    task: TaskRecord
    adapters: tuple[AdapterRecord, ...]
    vectors: tuple[VectorRecord, ...]
    nearest: tuple[Neighbour, ...]
    generator: GeneratorRecord | None
    code: CodeRecord | None
    initial: InitialA | None
    evaluations: tuple[EvaluationRecord, ...]
    # Digest of the chat template that its chats were read with when they were last read, and whether it came with the
    # adapter; None if no chats were read.
    template: str | None
    has_own_template: bool
    header: Mapping[str, str]  # what the trainer noted in the file of an image adapter

    @property
    def final(self) -> AdapterRecord:
        """The final adapter of the task."""
        return next(adapter for adapter in self.adapters if adapter.is_final)


@dataclass(frozen=True)
class Pinned:
    """What was pinned or unpinned."""

    names: list[str]
    evicted: list[str]


@dataclass(frozen=True)
class Removal:
    """What is deleted with a task."""

    name: str
    adapters: int
    size: int  # bytes of their files; other tasks may share some of them
    is_last_copy: bool  # whether its original was evicted, so that its code is the only copy
    placeholders: int = 0  # its adapters in whose folders a placeholder stands: nothing could restore them any more


@dataclass(frozen=True)
class ListRequest:
    """Which tasks to list, as `registry.filters` reads it."""

    base_model: str | None = None
    filters: Sequence[str] = ()
    sort: str | None = None
    limit: int | None = None

    def selection(self) -> Selection:
        """Return the filters and the order, or raise what is wrong with them."""
        if self.limit is not None and self.limit < 1:
            raise DataError(f"a limit of {self.limit} tasks lists nothing", hint="give 1 or more")
        sort = None if self.sort is None else parse_sort(self.sort)
        return Selection(self.base_model, tuple(map(parse_filter, self.filters)), sort, self.limit)


def filter_fields() -> Collection[Field]:
    """Return the fields by which tasks can be filtered and sorted."""
    return FIELDS.values()


def list_tasks(context: Context, request: ListRequest) -> list[TaskSummary]:
    """Return the selected tasks, by name unless another order is asked for."""
    selection = request.selection()
    with context.open(read_only=True) as store:
        return list(store.tasks.summaries(_of_base_model(store, selection)))


def list_names(context: Context, request: ListRequest) -> list[str]:
    """Return the names of the selected tasks, which takes a fraction of the time of `list_tasks`."""
    selection = request.selection()
    with context.open(read_only=True) as store:
        return store.tasks.names(_of_base_model(store, selection))


def _of_base_model(store: Store, selection: Selection) -> Selection:
    """Name the base model of a selection by its own name, and check that it has tasks."""
    base_model = base_name(store, selection.base_model)
    if base_model is not None:
        check_base_model(base_model, {base.name for base in store.base_models.all() if base.tasks})
    return replace(selection, base_model=base_model)


def rename_task(context: Context, old: str, new: str) -> TaskRecord:
    """Give a task another name."""
    with context.open() as store:
        return store.tasks.rename(old, new)


def tag_tasks(context: Context, names: Sequence[str], add: Sequence[str], remove: Sequence[str]) -> list[TaskRecord]:
    """Add and remove tags of tasks."""
    if both := {tag.lower() for tag in add} & {tag.lower() for tag in remove}:
        raise DataError(f"tag {min(both)!r} is both added and removed", hint="name it once")
    if not add and not remove:
        with context.open(read_only=True) as store:
            return list(dict.fromkeys(map(store.tasks.get, names)))
    with context.open() as store:
        return store.tasks.tag(names, add=add, remove=remove)


def list_tags(context: Context) -> Mapping[str, int]:
    """Return how many tasks have each tag."""
    with context.open(read_only=True) as store:
        return store.tasks.tags()


def set_note(context: Context, name: str, text: str | None) -> TaskRecord:
    """Replace or remove the note of a task."""
    with context.open() as store:
        return store.tasks.set_note(name, text)


def set_pinned(context: Context, names: Sequence[str], *, pinned: bool) -> Pinned:
    """Pin some tasks, or unpin them."""
    with context.open() as store:
        done = store.tasks.pin(names, pinned)
        return Pinned(done, [name for name in done if store.tasks.final(name).is_evicted])


def show_task(context: Context, name: str) -> TaskDetails:
    """Return everything about one task."""
    from icmlora.fleet.map.map import nearest_tasks

    with context.open(read_only=True) as store:
        task = store.tasks.get(name)
        generator = store.generators.current(task.base_model)
        code = None if generator is None else store.codes.get(task.name, generator.id)
        vectors = tuple(store.vectors.all(task.name))
        evaluations = tuple(store.evaluations.all(task.name))
        template = _template(vectors, evaluations)
        return TaskDetails(
            task=task,
            adapters=tuple(store.tasks.adapters(task.name)),
            vectors=vectors,
            nearest=nearest_tasks(store, task) if vectors else (),
            generator=generator,
            code=code,
            initial=None if generator is None or code is None else _initial(store, generator, code),
            evaluations=evaluations,
            template=template,
            has_own_template=template is not None and template == _own_template(store, task.name),
            header=header_of(store, store.tasks.final(task.name)),
        )


def header_of(store: Store, final: AdapterRecord) -> Mapping[str, str]:
    """Return what the trainer noted in the header of an image adapter; nothing for one of another kind."""
    if not format_named(final.format).is_for_images:
        return {}
    from icmlora.fleet.resources.decoding import base_tensors
    from icmlora.formats.extras import unpack_tensors
    from icmlora.formats.images.single_file_check import HEADER
    from icmlora.io.safetensors import peek_bytes

    try:
        if not final.is_evicted:
            found = peek_bytes(partial(store.blobs.start, final.weights))
            return {} if found is None else found.metadata
        blobs = [store.blobs.read(extra.blob) for extra in final.extras if extra.file is None]
        header = unpack_tensors(blobs, partial(base_tensors, store, final)).get(HEADER)
        return {} if header is None else parse_object(header.data, what="the header", max_bytes=len(header.data))
    except (DamagedStore, IcmLoraError):  # `icm verify` reports it
        return {}


def plan_removal(context: Context, names: Sequence[str]) -> list[Removal]:
    """Return what would be deleted with some tasks, each task once."""
    with context.open(read_only=True) as store:
        tasks = {store.tasks.get(name).name: None for name in names}
        return [_removal(store, name) for name in tasks]


def remove_tasks(context: Context, names: Sequence[str], *, last_copies: Collection[str] = ()) -> list[str]:
    """Remove tasks and return their names; pruning frees their bytes."""
    with context.open() as store:
        return [task.name for task in store.tasks.remove(names, last_copies=last_copies)]


def _template(vectors: Sequence[VectorRecord], evaluations: Sequence[EvaluationRecord]) -> str | None:
    facts = [*(row.settings for row in reversed(evaluations)), *(row.extractor for row in reversed(vectors))]
    return next((str(known["template"]) for known in facts if "template" in known), None)


def _own_template(store: Store, task: str) -> str | None:
    from icmlora.base_models.examples.chat_template import ChatTemplate
    from icmlora.fleet.resources.texts import adapter_template

    try:
        own = adapter_template(store, task)
    except (DamagedStore, IcmLoraError):
        return None
    return None if own is None else ChatTemplate(own, {}).digest


def _initial(store: Store, generator: GeneratorRecord, code: CodeRecord) -> InitialA | None:
    """Read the initialisation seed from a code; None if a file is damaged, which `icm verify` reports."""
    from icmlora.generator.code import Code, generator_of
    from icmlora.generator.file import versions_of

    try:
        data, versions = store.blobs.read(code.blob), versions_of(store.blobs.read(generator.blob))
        config = next((version.config for version in versions if version.digest == generator_of(data)), None)
        return None if config is None else Code.from_bytes(data, config).head.initial
    except (DamagedStore, IcmLoraError):
        return None


def _removal(store: Store, name: str) -> Removal:
    from icmlora.fleet.evict.placeholders import Placeholders

    adapters, folders = store.tasks.adapters(name), Placeholders(store, dry_run=True)
    size = sum(adapter.stored_bytes for adapter in adapters)
    is_last_copy = any(adapter.is_final and adapter.is_evicted for adapter in adapters)
    return Removal(name, len(adapters), size, is_last_copy, sum(map(folders.has_left, adapters)))
