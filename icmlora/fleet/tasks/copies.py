"""Copy tasks from one store to another, with everything that belongs to them.

    base models, generators ──▶ tasks that are there: what they lack ──▶ generator in use ──▶ new tasks

Each task is a transaction of its own, after its files are durable and were read back. So a copy that was stopped goes
on where it was, and nothing that the other store has is changed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from icmlora.errors import DataError
from icmlora.fleet.context import Context, select_tasks, use_case
from registry.errors import BaseModelConflict, DamagedStore, GeneratorConflict, LastCopy, TaskConflict
from registry.names import DatabaseUrl, absolute, address_of

if TYPE_CHECKING:
    from registry.storage.blobs.content import Blobs
    from registry.store import Store
    from registry.tables.copies import BaseRows, File

    _Base = tuple[BaseRows, str] | str
    """A base model with its name there, or why it cannot be copied."""

_BATCH_BYTES = 64 << 20


@dataclass
class CopyReport:
    """What became of each task."""

    copied: list[str] = field(default_factory=list)
    completed: list[str] = field(default_factory=list)  # were there, and lacked something
    known: list[str] = field(default_factory=list)  # were there with all of it
    refused: dict[str, str] = field(default_factory=dict)  # task -> why it was not copied
    size: int = 0  # bytes of files that the other store did not have


@use_case
def copy_tasks(context: Context, target: str | Path | DatabaseUrl, tasks: Sequence[str] = ()) -> CopyReport:
    """Copy tasks to another store, which is created if there is none.

    A task goes with its originals, checkpoints, texts, vectors, codes and measurements, its base model with all names
    and generators. A task that is there with the same adapter gets what it lacks. The generator that is in use here is
    in use there too if there was none, or if it was made from the one in use there and has all its codes.

    Args:
        context: The store to copy from.
        target: The store to copy to: a folder, or the address of a database.
        tasks: Names; all tasks by default.

    Raises:
        DataError: Both are the same store.
    """
    there, report = replace(context, address=address_of(target)), CopyReport()
    if absolute(there.address) == absolute(context.address):
        raise DataError(f"{there.address} is both source and target", hint="choose another store")
    with context.open(read_only=True) as source, there.open(create=True) as other:
        chosen = select_tasks(source, tasks)
        copying = _Copying(source, other, report)
        bases = {name: copying.base(name) for name in dict.fromkeys(task.base_model for task in chosen)}
        # What is there first: a generator is in use only once it has the codes of all of them.
        known = {task.name for task in chosen if other.tasks.find(task.name) is not None}
        chosen.sort(key=lambda task: task.name not in known)
        for done, task in enumerate(chosen):
            context.progress(done, len(chosen), task.name)
            if done == len(known):
                copying.advance(bases.values())
            copying.task(task.name, bases[task.base_model])
        if len(chosen) == len(known):
            copying.advance(bases.values())
        context.progress(len(chosen), len(chosen))
    return report


class _Copying:
    """Copies from one open store to another, and notes what came of it."""

    def __init__(self, source: Store, other: Store, report: CopyReport) -> None:
        self._source, self._other, self._report = source, other, report

    def base(self, name: str) -> _Base:
        """Copy a base model; return it with its name there, or why it cannot be copied."""
        from registry.tables.copies import files_of

        try:
            rows = self._source.copies.base(name)
            self._put(files_of(rows.generators).values())
            return rows, self._other.copies.add_base(rows)
        except (BaseModelConflict, DamagedStore) as error:
            return error.message

    def task(self, name: str, base: _Base) -> None:
        """Copy a task, or note why that cannot be."""
        report = self._report
        if isinstance(base, str):
            report.refused[name] = base
            return
        try:
            base_model = base[1]
            rows = self._source.copies.task(name)
            is_there = self._other.copies.check(rows, base_model)
            self._put(rows.files().values(), is_there=is_there)
            is_new = self._other.copies.add_task(rows, base_model)
        except (TaskConflict, GeneratorConflict, DamagedStore) as error:
            report.refused[name] = error.message
            return
        (report.known if not is_new else report.completed if is_there else report.copied).append(name)

    def advance(self, bases: Iterable[_Base]) -> None:
        """Put the generators in use that are in use here, where they were made from those in use there."""
        generators = self._other.generators
        for rows, name in (base for base in bases if not isinstance(base, str)):
            wanted, present = rows.current(), generators.current(name)
            if (
                wanted is None
                or present is None
                or present.blob == wanted
                or present.blob not in rows.ancestors(wanted)
            ):
                continue
            number = next(found.id for found in generators.all(name) if found.blob == wanted)
            uses = {use.generator.id: set(use.tasks) for use in generators.uses()}
            if uses[present.id] <= uses[number]:
                with suppress(LastCopy):  # it has another code of an evicted task
                    generators.make_current(number)

    def _put(self, files: Iterable[File], *, is_there: bool = False) -> None:
        """Copy the bytes of files; where the task `is_there`, only those that are missing."""
        source, other, batch = self._source.blobs, self._other.blobs, list[bytes]()
        for file in files:
            had = other.exists(file.digest)
            if (had and is_there) or file.is_let_go or not (file.is_needed or source.exists(file.digest)):
                continue
            batch.append(source.read(file.digest))
            self._report.size += 0 if had else len(batch[-1])
            if sum(map(len, batch)) > _BATCH_BYTES:
                _put(other, batch)
        _put(other, batch)


def _put(blobs: Blobs, batch: list[bytes]) -> None:
    """Store some files and read them back; empties the batch."""
    for digest in blobs.put_all(batch):
        blobs.check(digest)
    batch.clear()
