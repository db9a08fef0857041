"""Show one task. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from icmlora.base_models.examples.chat_template import ChatTemplate
from icmlora.errors import IcmLoraError
from icmlora.fleet.context import Context, use_case
from icmlora.fleet.params import TaskName
from icmlora.formats.catalogue import format_named
from icmlora.formats.file_header import HEADER
from icmlora.formats.tensor_hash import same_tensors, tensors_digest
from icmlora.io.safetensors import peek_bytes
from icmlora.io.strict_json import parse_object
from registry.errors import DamagedStore, GeneratorNotFound
from registry.manifests import Generator, Task

if TYPE_CHECKING:
    from icmlora.generator.initial_a.draw import InitialA
    from icmlora.task_vectors.distances import Neighbour
    from registry.store import Store


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
