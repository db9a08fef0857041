"""Delete originals, each after a check that its code can replace it.

    pinned? ──▶ code (and residual)? ──▶ read back from disk, decoded, measured ──▶ evicted (rows, then files)
       └────────────────┴────────────────────┴──▶ kept, with the reason

    with placeholder    before that: the adapter in the user's folder gives way to a placeholder
    keep_originals      only the folder: nothing in the store is deleted, and no code is needed

Each eviction is durable before it is reported. A kill never loses an original that was not checked, and the same
command continues.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache
from itertools import chain, groupby
from typing import TYPE_CHECKING

from icmlora.errors import Cancelled, IcmLoraError, OptionsConflict
from icmlora.fleet.context import Context, reporting, select_tasks, use_case
from icmlora.fleet.evict.check import EvictionCheck, check_bytes, check_recorded, recorded_gain
from icmlora.fleet.evict.placeholders import FolderReplaced, Placeholders, RestoreSource
from icmlora.fleet.evict.types import CheckFailed, EvictReport, EvictStatus, Limits, TaskEvicted
from icmlora.fleet.failures import FAILURES, Failed
from icmlora.fleet.resources.decoding import StoredDecoder
from icmlora.fleet.resources.loading import Models
from icmlora.fleet.resources.workers import Tell, check_place, worker_pool
from icmlora.formats.format import AdapterBytes
from icmlora.io.second_process import in_two_processes
from icmlora.io.text import counted
from registry.errors import DamagedStore, LastCopy, StoreIOError, TaskNotFound
from registry.records import (
    AdapterRecord,
    CodeRecord,
    Eviction,
    GeneratorRecord,
    TaskRecord,
)

if TYPE_CHECKING:
    from registry.store import Store

_READ_TOGETHER = 32
"""Tasks whose rows are read at once."""


@use_case
def evict(
    context: Context,
    tasks: Sequence[str] = (),
    *,
    max_error: float | None = None,
    min_gain: float | None = None,
    checkpoints_only: bool = False,
    placeholder: bool = False,
    keep_originals: bool = False,
    dry_run: bool = False,
    device: str = "auto",
    workers: str | None = None,
) -> EvictReport:
    """Delete originals, each after a check that its code can replace it.

    The code is read back from disk, with its residual if it has one, decoded and measured. An original whose code
    misses a limit is kept. Give at least one limit, unless the originals are kept.

    Args:
        context: The store.
        tasks: Names of tasks; all by default.
        max_error: Largest relative error, ||dW' - dW|| / ||dW||: 0.3 for 30 %.
        min_gain: Smallest retained gain on the task's held-out text. Needs the base model.
        checkpoints_only: Delete checkpoints and keep the final adapters.
        placeholder: Also replace the adapter in the folder it was ingested from by a placeholder, if its files
            are unchanged; `restore` brings it back.
        keep_originals: With `placeholder`: delete nothing in the store, so that `restore` is exact.
        dry_run: Check everything and delete nothing.
        device: Where to measure.
        workers: Where to check, as described for `Fleet`. Deletions then begin when all is checked.

    Raises:
        OptionsConflict: There is no limit, or the arguments contradict each other.
    """
    limits = Limits(max_error, min_gain)
    _check_options(limits, checkpoints_only, placeholder, keep_originals)
    check_place(device, workers)
    report = EvictReport()
    # Loading a base model to measure a gain may tell the store what it is, so that takes a writable store.
    with context.open(read_only=dry_run and min_gain is None) as store, reporting(report):
        chosen = select_tasks(store, tasks)
        evictor = Evictor(store, limits if placeholder else None, checkpoints_only=checkpoints_only, dry_run=dry_run)
        if not (keep_originals or dry_run):
            store.originals.check_alone()
        context.progress(0, len(chosen))

        def tell(note: str) -> None:
            context.progress(len(report.tasks), len(chosen), note)

        for base_model, of_base in groupby(chosen, key=lambda task: task.base_model):
            with nullcontext() if dry_run else store.job(base_model):
                checked: Iterator[tuple[TaskRecord, TaskEvicted | _Evictable | Failed | None]]
                if keep_originals:
                    checked = ((task, None) for task in of_base)
                else:
                    checked = _checked(
                        context, store, list(of_base), device, workers, tell, limits, checkpoints_only, dry_run
                    )
                for task, made in checked:
                    done = evictor.evict(task.name, made)
                    report.tasks.append(done)
                    meant = done.status in ("pinned", "original_only") and bool(tasks)
                    report.partly |= done.is_partial or meant
                    context.on_event(done)
                    tell(task.name)
    return report


def _check_options(limits: Limits, checkpoints_only: bool, placeholder: bool, keep_originals: bool) -> None:
    """Refuse what would delete originals whatever their codes lose, or contradicts itself."""
    given = [limit for limit in (limits.max_error, limits.min_gain) if limit is not None]
    if keep_originals and not placeholder:
        raise OptionsConflict("--keep-originals goes with --placeholder: it would delete nothing")
    if keep_originals and given:
        raise OptionsConflict("a limit is for originals that are deleted: leave it out with --keep-originals")
    if placeholder and checkpoints_only and not keep_originals:
        hint = "add --keep-originals, or leave out --checkpoints-only"
        raise OptionsConflict("a checkpoint has no code, so without its original nothing brings it back", hint=hint)
    if not given and not keep_originals:
        hint = "`--max-error 0.22` limits the relative error, `--min-gain 0.97` the retained gain"
        raise OptionsConflict("no limit was given: use --max-error, --min-gain or both", hint=hint)
    if not all(map(math.isfinite, given)):
        raise OptionsConflict("a limit must be a finite number")


def _checked(
    context: Context,
    store: Store,
    tasks: Sequence[TaskRecord],
    device: str,
    workers: str | None,
    tell: Tell,
    limits: Limits,
    checkpoints_only: bool,
    dry_run: bool,
) -> Iterator[tuple[TaskRecord, TaskEvicted | _Evictable | Failed]]:
    """Check the codes of tasks of one base model."""
    interrupted = frozenset(store.originals.interrupted())
    with worker_pool(context, store, device=device, workers=workers) as pool:
        found = pool.each(check_codes, tasks, tell, limits, checkpoints_only, dry_run, interrupted)
        if workers is None:
            yield from found
            return
        checked = list(found)
    # Only now: a deletion waits until no other process has the store open, and the workers had.
    yield from checked


@dataclass(frozen=True)
class _Evictable:
    """Originals of a task whose code was checked."""

    order: Eviction
    rows: Sequence[AdapterRecord]
    final: AdapterRecord  # one of the rows, or evicted before
    gain: float | None  # the retained gain of the code, if it was measured
    precision: str | None  # of the base model that it was measured on


def check_codes(
    models: Models,
    tasks: Sequence[TaskRecord],
    tell: Tell,
    limits: Limits,
    checkpoints_only: bool,
    dry_run: bool,
    interrupted: frozenset[str],
) -> Iterator[tuple[TaskRecord, TaskEvicted | _Evictable]]:
    """Check the codes of tasks of one base model, or say why they keep their originals; nothing is deleted."""
    yield from _Checker(limits, checkpoints_only, dry_run, interrupted, models).each(tasks)


class _Checker:
    """Checks one task after the other, and deletes nothing."""

    def __init__(
        self, limits: Limits, checkpoints_only: bool, dry_run: bool, interrupted: frozenset[str], models: Models
    ) -> None:
        self._store, self._interrupted = models.store, interrupted
        self._checkpoints_only, self._dry_run = checkpoints_only, dry_run
        self._check = EvictionCheck(models.store, models, limits)
        self._generator = cache(models.store.generators.current)  # of all tasks of a base model

    def each(self, tasks: Sequence[TaskRecord]) -> Iterator[tuple[TaskRecord, TaskEvicted | _Evictable]]:
        """Check tasks of one base model; the rows of many are read at once, which takes a fraction of the time."""
        # A deletion lets others change what was read before it.
        size = _READ_TOGETHER if self._dry_run else 1
        parts = [tasks[at : at + size] for at in range(1, len(tasks), size)]
        yield from self._together(tasks[:1])  # it opens the generator for all
        if self._dry_run and self._check.limits.min_gain is None:
            yield from in_two_processes(self._together, parts)
        else:  # a base model that measures gains is in memory once
            yield from chain.from_iterable(map(self._together, parts))

    def _together(self, tasks: Sequence[TaskRecord]) -> Iterator[tuple[TaskRecord, TaskEvicted | _Evictable]]:
        names, generator = [task.name for task in tasks], self._generator(tasks[0].base_model)
        found = self._store.tasks.wholes(names)
        codes = {} if generator is None else self._store.codes.of(names, generator.id)
        for task in tasks:
            try:
                whole = found.get(task.name) or self._store.tasks.whole(task.name)
            except TaskNotFound:  # `icm rm` does not wait for this job
                yield task, TaskEvicted(task.name, "removed")
            else:
                yield task, self._checked(*whole, codes.get(task.name), generator)

    def _checked(
        self,
        task: TaskRecord,
        adapters: Sequence[AdapterRecord],
        code: CodeRecord | None,
        generator: GeneratorRecord | None,
    ) -> TaskEvicted | _Evictable:
        there = [row for row in adapters if not row.is_evicted or row.weights in self._interrupted]
        wanted = [row for row in there if not (row.is_final and self._checkpoints_only)]
        chosen = [row for row in wanted if row.original_only is None]
        if task.pinned or not wanted:
            return self._untouched(task, code, generator)
        if adapters[-1].original_only is not None:
            return TaskEvicted(task.name, "original_only", reason=adapters[-1].original_only)
        if not chosen:
            return TaskEvicted(task.name, "original_only", reason=wanted[0].original_only)
        if code is None or generator is None:
            return TaskEvicted(task.name, "kept", reason="it has no code; `icm train --update` makes one")
        final = adapters[-1]
        try:
            # A row may say "evicted" for another reason than an interrupted run: what is there decides.
            present = replace(final, evicted_at=None) if final in there else final
            checked = self._check.run(task, present, code, generator)
        except CheckFailed as error:
            figures = (*_sizes(code), error.squared_error, error.retained_gain)
            reason = f"{_still_there(chosen)}{error}"
            return TaskEvicted(task.name, "kept", 0, 0, *figures, reason, precision=error.precision)
        except Cancelled:
            raise
        except (IcmLoraError, DamagedStore, StoreIOError) as error:
            reason = f"{_still_there(chosen)}{error}"
            return TaskEvicted(task.name, "kept", 0, 0, *_sizes(code), reason=reason)
        numbers = [row.id for row in chosen]
        order = Eviction(task.name, numbers, final, code, generator, checked.squared_error, checked.evaluations)
        return _Evictable(order, chosen, final, checked.retained_gain, checked.precision)

    def _untouched(self, task: TaskRecord, code: CodeRecord | None, generator: GeneratorRecord | None) -> TaskEvicted:
        status: EvictStatus = "pinned" if task.pinned else "known"
        if code is None or generator is None:
            return TaskEvicted(task.name, status)
        gain, precision = recorded_gain(self._store, task, code, generator)
        figures = (*_sizes(code), code.best_squared_error, gain)
        return TaskEvicted(task.name, status, 0, 0, *figures, precision=precision)


class Evictor:
    """Deletes originals that were checked, or only counts their bytes.

    Args:
        store: The store.
        limits: What the codes have to keep for which placeholders are left; None to leave none.
        checkpoints_only: Final adapters stay.
        dry_run: Nothing is deleted.
    """

    def __init__(self, store: Store, limits: Limits | None, *, checkpoints_only: bool, dry_run: bool) -> None:
        self._store, self._limits = store, limits
        self._checkpoints_only, self._dry_run = checkpoints_only, dry_run
        self._folders, self._decoder = Placeholders(store, dry_run=dry_run), StoredDecoder(store)
        self._in_use = Counter(store.originals.in_use())

    def evict(self, name: str, made: TaskEvicted | _Evictable | Failed | None) -> TaskEvicted:
        """Delete the originals of a task, or say why not; None where they are kept and only folders are freed."""
        if isinstance(made, Failed):
            return TaskEvicted(name, "kept", reason=made.error.message)
        try:
            if made is None:
                return self._replace(self._store.tasks.get(name))
            return self._with_folder(made) if isinstance(made, TaskEvicted) else self._delete(name, made)
        except TaskNotFound:  # `icm rm` does not wait for this job
            return TaskEvicted(name, "removed")

    def _delete(self, name: str, made: _Evictable) -> TaskEvicted:
        sizes = _sizes(made.order.code)
        rows, held_back = self._may_go(made.rows)
        if not rows:
            figures = (*sizes, made.order.squared_error, made.gain)
            return TaskEvicted(name, "kept", 0, 0, *figures, held_back, precision=made.precision)
        order = replace(made.order, adapters=[row.id for row in rows])
        # First the folder: until its row says otherwise, the original can bring back what goes there.
        folders = self._folder_of(made.final, order.code, order.generator, is_checked=made.final in rows)
        freed, left = self._freed(rows)
        try:
            if not self._dry_run:
                freed = self._store.originals.evict(order)
        except (DamagedStore, LastCopy) as error:
            return TaskEvicted(name, "kept", 0, 0, *sizes, reason=str(error), folders=folders)
        status: EvictStatus = "would_evict" if self._dry_run else "evicted"
        figures = (*sizes, order.squared_error, made.gain)
        told = (held_back, folders, made.precision, left)
        return TaskEvicted(name, status, len(rows), freed, *figures, *told)

    def _may_go(self, rows: Sequence[AdapterRecord]) -> tuple[list[AdapterRecord], str | None]:
        """Return the adapters that may go, and why others may not: nothing else brings a checkpoint back."""
        held_back = [row for row in rows if not row.is_final and self._folders.has_left(row)]
        if not held_back:
            return list(rows), None
        reason = f"a placeholder stands for it at {held_back[-1].source}, and a checkpoint has no code"
        return [row for row in rows if row not in held_back], f"{counted(len(held_back), 'checkpoint')} kept: {reason}"

    def _with_folder(self, done: TaskEvicted) -> TaskEvicted:
        """Free the folder of a task whose original was evicted before."""
        if done.status != "known":
            return done
        task, final = self._store.tasks.get(done.task), self._store.tasks.final(done.task)
        return replace(done, folders=self._folder_of(final, *_code_of(self._store, task), is_checked=False))

    def _folder_of(
        self, final: AdapterRecord, code: CodeRecord | None, generator: GeneratorRecord | None, *, is_checked: bool
    ) -> list[FolderReplaced]:
        """Leave a placeholder for a task whose code replaces its original; `is_checked` if that was measured now."""
        limits = self._limits
        if limits is None:
            return []

        def check() -> None:
            if code is None or generator is None:
                raise CheckFailed("it has no code")
            now = self._store.tasks.get(final.task)
            row, (code_now, _) = self._store.tasks.final(now.name), _code_of(self._store, now)
            if (row.weights, row.config, code_now) != (final.weights, final.config, code):
                raise CheckFailed("the task changed while its code was checked; run the same command again")
            if is_checked:
                check_bytes(self._store, final, [generator.blob, *code.digests()])
                return
            check_recorded(self._store, now, final, limits, code, generator)

        def decoded() -> AdapterBytes | None:
            if code is None or generator is None:
                return None
            try:
                return self._decoder.files(final, code, generator)
            except FAILURES:  # the check says what is wrong with it
                return None

        left = self._folders.replace_files(final, RestoreSource(check, code, generator, decoded))
        return [] if left is None else [left]

    def _replace(self, task: TaskRecord) -> TaskEvicted:
        """Free the folders of a task, whose originals the store keeps."""
        if task.pinned:
            return TaskEvicted(task.name, "pinned")
        code, generator = _code_of(self._store, task)
        rows = self._store.tasks.adapters(task.name)
        rows = [row for row in rows if not (row.is_final and self._checkpoints_only)]
        left = [self._folder_with_original(row, code if row.is_final else None, generator) for row in rows]
        folders = [folder for folder in left if folder is not None]
        done = sum(folder.status in ("replaced", "would_replace") for folder in folders)
        if done:
            return TaskEvicted(task.name, "would_replace" if self._dry_run else "replaced", done, folders=folders)
        reason = next((folder.reason for folder in folders if folder.status == "left"), None)
        return TaskEvicted(task.name, "known" if reason is None else "kept", reason=reason, folders=folders)

    def _folder_with_original(
        self, row: AdapterRecord, code: CodeRecord | None, generator: GeneratorRecord | None
    ) -> FolderReplaced | None:
        def check() -> None:
            if row.is_evicted:
                raise CheckFailed("the store does not keep its original any more")
            check_bytes(self._store, row, [row.weights])

        return self._folders.replace_files(row, RestoreSource(check, code, generator))

    def _freed(self, chosen: Sequence[AdapterRecord]) -> tuple[int, int]:
        """Return the bytes of the files that are deleted with some adapters, and those of them that were left.

        Several adapters may share a file. One that an interrupted eviction left is in no adapter's use any more.
        """
        freed, left = dict[str, int](), dict[str, int]()
        for row in chosen:
            for digest, size in row.evictable.items():
                if not row.is_evicted:
                    self._in_use[digest] -= 1
                if not self._in_use[digest] and self._store.blobs.exists(digest):
                    (left if row.is_evicted else freed)[digest] = size
        return sum((left | freed).values()), sum(left.values())


def _still_there(rows: Sequence[AdapterRecord]) -> str:
    """Say what is odd about weights that are there although their rows call them deleted."""
    if not any(row.is_evicted for row in rows):
        return ""
    return "an interrupted eviction left its weights, and they stay: "


def _code_of(store: Store, task: TaskRecord) -> tuple[CodeRecord | None, GeneratorRecord | None]:
    """Return the code of a task under the current generator, and that generator."""
    generator = store.generators.current(task.base_model)
    return None if generator is None else store.codes.get(task.name, generator.id), generator


def _sizes(code: CodeRecord) -> tuple[int, int | None]:
    """Return the bytes of a code, and of its residual."""
    return code.size, None if code.residual is None else code.residual.size
