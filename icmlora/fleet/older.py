"""Generators and codes that an older icm wrote, in a format that this one does not read.

They stay in the store, and nothing is deleted for them. A task whose original is here gets a new code from `icm train`.
Of a task that was evicted they are all there is: the icm that wrote them has to write its adapter. It reads the copy of
the database that was kept when the store moved to a new schema (`registry.storage.migrations`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from icmlora.errors import OtherFormat
from icmlora.io.text import counted, some

if TYPE_CHECKING:
    from icmlora.generator.versions import GeneratorFile
    from registry.records import GeneratorRecord, TaskRecord, TaskSummary
    from registry.store import Store

READER = "icm 0.9"
"""What reads the format from before this one."""

WAY_OUT = (
    "to recover a task without its original, copy the store folder, rename registry.db.schema-8 in the copy to "
    f"registry.db, run `icm materialize` of {READER} there, and ingest the result here"
)


def open_generator(digest: str, read: Callable[[str], bytes]) -> GeneratorFile:
    """Open a generator of the store; `read` returns the bytes of its file. Raises `OtherFormat` with the ways out."""
    from icmlora.generator.versions import GeneratorFile

    with told_of(digest):
        return GeneratorFile(read(digest))


def told_of(generator: str) -> AbstractContextManager[None]:
    """Say in errors of the block which generator of the store has an older format, and the ways out."""
    hint = f"run `icm train` to make a new generator and new codes of the stored originals; {WAY_OUT}"
    return _told(f"generator {generator[:12]} has an older format, which this icm does not read", hint)


def told_of_bundle() -> AbstractContextManager[None]:
    """Say in errors of the block what can be done with a bundle whose codes have an older format."""
    hint = f"run `icm materialize TASK --from FILE` of {READER}, then ingest the adapters here"
    return _told("the codes of this bundle have an older format, which this icm does not read", hint)


@contextmanager
def _told(fact: str, hint: str) -> Iterator[None]:
    try:
        yield
    except OtherFormat as error:
        if not error.is_older:
            raise
        raise OtherFormat(fact, is_older=True, hint=hint) from error


def only_in_older_code(task: str) -> OtherFormat:
    """Return the error for an evicted task whose only code has an older format."""
    fact = f"the original of task {task!r} was evicted, and its code has an older format, which this icm does not read"
    return OtherFormat(fact, is_older=True, hint=WAY_OUT)


def is_older(store: Store, generator: GeneratorRecord | None) -> bool:
    """Say whether a generator has a format that is not read any more; damage is for others to find."""
    from icmlora.generator.file import MAGIC

    if generator is None or not store.blobs.exists(generator.blob):
        return False
    start = store.blobs.start(generator.blob, len(MAGIC))
    return start[:-1] == MAGIC[:-1] and start < MAGIC


def has_older_code(store: Store, task: TaskRecord) -> bool:
    """Say whether a task without a code under the current generator has one under another.

    If it was evicted, that one has an older format: any other generator has a code of every evicted task.
    """
    return any(store.codes.get(task.name, one.id) is not None for one in store.generators.all(task.base_model))


@dataclass(frozen=True)
class OlderCodes:
    """The tasks of a base model whose codes have an older format."""

    base_model: str
    tasks: tuple[str, ...]  # whose originals are here
    evicted: tuple[str, ...]  # of which there is nothing else

    @property
    def told(self) -> str:
        """What this means and what to do, in a sentence."""
        text = f"codes of {self.base_model} have an older format, which this icm does not read"
        if self.tasks:
            text += f"; run `icm train` to encode {counted(len(self.tasks), 'task')} again"
        return f"{text}; {some(self.evicted)}: {WAY_OUT}" if self.evicted else text


def older_codes(store: Store, rows: Sequence[TaskSummary]) -> list[OlderCodes]:
    """Find the codes of an older format that tasks still need, by base model."""
    found = []
    for label in sorted({row.task.base_model for row in rows}):
        of_base = [row for row in rows if row.task.base_model == label]
        is_old = is_older(store, store.generators.current(label))
        tasks = [row.task.name for row in of_base if is_old and row.code is not None and not row.final.is_evicted]
        gone = [row for row in of_base if row.final.is_evicted]
        evicted = [row.task.name for row in gone if (is_old if row.code else has_older_code(store, row.task))]
        if tasks or evicted:
            found.append(OlderCodes(label, tuple(tasks), tuple(evicted)))
    return found
