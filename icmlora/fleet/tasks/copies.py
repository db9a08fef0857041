"""Copy tasks from one store to another, with everything that belongs to them.

    base models ──▶ generators ──▶ blobs of a task, durable ──▶ the task with all its versions

Each task is published on its own, so a copy that was stopped continues. Nothing in the other store is changed, except
that missing parts of a task with the same adapter are added.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from icmlora.errors import DataError
from icmlora.fleet.bases.labels import renumbered
from icmlora.fleet.context import Context, select_tasks, use_case
from registry.encoding import encode, files_of
from registry.errors import BaseModelConflict, DamagedStore, LostRace, RegistryError, TaskConflict
from registry.manifests import BaseRecord, File, Generator, State, Task
from registry.names import DatabaseUrl, absolute, address_of

if TYPE_CHECKING:
    from registry.store import Store

_BATCH_BYTES = 64 << 20


@dataclass
class CopyReport:
    """The result for each task."""

    copied: list[str] = field(default_factory=list)
    completed: list[str] = field(default_factory=list)  # were there, and lacked something
    known: list[str] = field(default_factory=list)  # were there with all of it
    refused: dict[str, str] = field(default_factory=dict)  # task -> why it was not copied
    size: int = 0  # bytes of files that the other store did not have


@use_case
def copy_tasks(context: Context, target: str | Path | DatabaseUrl, tasks: Sequence[str] = ()) -> CopyReport:
    """Copy tasks to another store, which is created if there is none.

    A task goes with all its versions, originals, checkpoints, texts, vectors, codes and measurements, and with its base
    model and the generators that its codes need. A task that is there with the same adapter is completed. The
    generator in use here is in use there too if there was none, or if it continues the one in use there.

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
        bases = {name: copying.copy_base(name) for name in dict.fromkeys(task.base_model for task in chosen)}
        for done, task in enumerate(chosen):
            context.progress(done, len(chosen), task.name)
            copying.copy_task(task, bases[task.base_model])
        context.progress(len(chosen), len(chosen))
    return report


class _Copying:
    """Copies from one open store to another, and fills the report."""

    def __init__(self, source: Store, other: Store, report: CopyReport) -> None:
        self._source, self._other, self._report = source, other, report
        self._verified = set[str]()  # blobs of the other store that were read back

    def copy_base(self, name: str) -> str | RegistryError:
        """Copy facts, labels and generators of a base model; return its name there, or why it cannot be copied."""
        base = self._source.base_model(name)
        known = next((self._other.base_model(label) for label in base.names if self._knows(label)), base)
        if None not in (known.fingerprint, base.fingerprint) and known.fingerprint != base.fingerprint:
            fact = f"the target store uses the name {known.name!r} for another model"
            return BaseModelConflict(
                fact, hint="run `icm base ls` in both stores, then rename one with `icm base alias`"
            )

        def with_facts(theirs: BaseRecord) -> BaseRecord:
            labels = tuple(one for one in base.labels if one.label not in theirs.names and not self._knows(one.label))
            facts = theirs if theirs.fingerprint is not None else base
            return replace(theirs, labels=(*theirs.labels, *labels), fingerprint=facts.fingerprint, shape=facts.shape)

        try:
            if base.manifest is not None:
                self._other.update_base(known.name, with_facts)
            self._copy_generators(base.name, known.name)
        except DamagedStore as error:
            return error
        return known.name

    def copy_task(self, task: Task, base_model: str | RegistryError) -> None:
        """Copy a task, or note why that cannot be."""
        report, name = self._report, task.name
        try:
            if isinstance(base_model, RegistryError):
                raise base_model
            versions = self._source.history(name)
            if base_model != task.base_model:
                versions = [replace(one, base_model=base_model, label=one.label or one.base_model) for one in versions]
            try:
                known = self._other.find(name)
            except DamagedStore:  # it may have lost documents that its manifest shares with others
                self._other.blobs.put_all([data for one in versions for data in encode(one).documents.values()])
                known = self._other.find(name)
            if known is None:
                self._put(versions, read_back=True)
                self._other.adopt(versions)
                report.copied.append(name)
            else:
                is_completed = self._put(self._other.history(known.name), if_here=True)
                while new := _missing(self._other.history(known.name), versions):
                    self._put(new)
                    try:
                        self._other.publish(new, older=True)
                    except LostRace:  # another process changed it
                        continue
                    is_completed = True
                    break
                (report.completed if is_completed else report.known).append(name)
        except (BaseModelConflict, TaskConflict, LostRace, DamagedStore) as error:
            report.refused[name] = error.message

    def _knows(self, label: str) -> bool:
        base = self._other.base_model(label)
        return base.manifest is not None or self._other.task_counts().get(base.name, 0) > 0

    def _copy_generators(self, base_model: str, there: str) -> None:
        """Copy generators that the other store lacks; the last one is in use there if it may be."""
        mine, theirs = self._source.generators(base_model), self._other.generators(there)
        current = self._other.generator(there)
        self._put(theirs, if_here=True)
        new = [one for one in mine if one.blob not in {known.blob for known in theirs}]
        if not new:
            return
        self._put(new, read_back=True)
        may_be_used = current is None or _continues(mine, current)
        used = self._source.generator(base_model) if may_be_used else current
        if used is not None and used.blob in {one.blob for one in theirs}:
            used = current
        self._other.publish(renumbered(self._other, there, new, current, used))

    def _put(self, states: Sequence[State], *, read_back: bool = False, if_here: bool = False) -> bool:
        """Copy blobs that states need and the other store lacks, and read them back; return whether it lacked any.

        Args:
            states: The states.
            read_back: Also check the blobs that the other store has.
            if_here: Skip blobs that this store lacks too.
        """
        other, here = self._other.blobs, self._source.blobs
        has_copied, batch = False, list[bytes]()
        needed = dict.fromkeys(str(file) for state in states for file in _needed(state))
        for digest in [digest for digest in needed if digest not in self._verified]:
            has = other.exists(digest)
            if (has and not read_back) or (if_here and not here.exists(digest)):
                continue
            batch.append(here.read(digest))
            has_copied |= not has
            self._report.size += 0 if has else len(batch[-1])
            if sum(map(len, batch)) >= _BATCH_BYTES:
                self._put_batch(batch)
                batch = []
        self._put_batch(batch)
        return has_copied

    def _put_batch(self, batch: Sequence[bytes]) -> None:
        for digest in self._other.blobs.put_all(batch):
            self._other.blobs.check(digest)
            self._verified.add(digest)


def _needed(state: State) -> Iterable[File]:
    _, documents, body = encode(state)
    return (file for _, file in files_of(body) if str(file) not in documents)


def _continues(mine: Sequence[Generator], current: Generator) -> bool:
    """Return whether the generator in use here was made from the one in use there, in one or several steps."""
    parents = {str(one.blob): one.trained_from for one in mine}
    at: str | None = str(mine[-1].blob) if mine else None
    while at is not None and at != current.blob:
        at = parents.get(at)
    return at is not None


def _missing(known: Sequence[Task], versions: Sequence[Task]) -> list[Task]:
    """Return the states that complete the versions of a known task, oldest first.

    Raises:
        TaskConflict: A version has another adapter.
    """
    numbers, present = {one.version: one for one in known}, known[-1]
    pairs = [(numbers[one.version], one) for one in versions if one.version in numbers]
    if not pairs or any(mine.base_model != one.base_model or not mine.final.is_same(one.final) for mine, one in pairs):
        raise TaskConflict(present.name, fact=f"the target store has another task named {present.name!r}")
    changed = [completed for mine, one in pairs if (completed := _completed(mine, one)) != mine]
    added = [replace(one, manifest=None) for one in versions if one.version not in numbers]
    if added and added[-1].version > present.version:  # it becomes the current version, and only that is checked
        kept = {name: getattr(present, name) for name in ("tags", "note", "pinned", "manifest", "seq")}
        added[-1] = replace(added[-1], **kept, aliases={**added[-1].aliases, **present.aliases})
    return sorted([*changed, *added], key=lambda task: task.version)


def _completed(known: Task, task: Task) -> Task:
    """Return a version of a known task with its missing parts."""
    steps = {(one.weights, one.config, one.step) for one in known.checkpoints}
    checkpoints = (one for one in task.checkpoints if (one.weights, one.config, one.step) not in steps)
    files = {extra.file for extra in known.final.extras}
    extras = (extra for extra in task.final.extras if extra.file is not None and extra.file not in files)
    subjects = {one.subject for one in known.measured}
    return replace(
        known,
        final=replace(known.final, extras=(*known.final.extras, *extras)),
        checkpoints=(*known.checkpoints, *checkpoints),
        samples=known.samples or task.samples,
        eval_data=known.eval_data or task.eval_data,
        vectors=known.vectors or task.vectors,
        code=known.code or task.code,
        measured=(*known.measured, *(one for one in task.measured if one.subject not in subjects)),
        aliases={**task.aliases, **known.aliases},
    )
