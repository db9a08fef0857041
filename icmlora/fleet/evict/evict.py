"""Delete originals, each after a check that its code can replace it.

    pinned? ──▶ code? ──▶ read back from disk, decoded, measured ──▶ evicted (rows, then files)
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
from dataclasses import replace
from itertools import groupby
from typing import TYPE_CHECKING

from icmlora.errors import OptionsConflict
from icmlora.fleet.context import Context, OpenedGenerator, current_code, reporting, select_tasks, use_case
from icmlora.fleet.evict.check import Evictable, check_bytes, check_codes, check_recorded
from icmlora.fleet.evict.placeholders import FolderReplaced, Placeholders, RestoreSource
from icmlora.fleet.evict.types import CheckFailed, EvictLimits, EvictReport, EvictStatus, TaskEvicted
from icmlora.fleet.failures import FAILURES, Failed
from icmlora.fleet.resources.decoding import files_of_code
from icmlora.fleet.resources.workers import Tell, check_place, worker_pool
from icmlora.formats.format import AdapterBytes
from icmlora.io.text import counted
from registry.errors import DamagedStore, LastCopy, TaskNotFound
from registry.records import AdapterRecord, CodeRecord, GeneratorRecord, TaskRecord

if TYPE_CHECKING:
    from registry.store import Store


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

    The code is read back from disk, decoded and measured. An original whose code
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
    limits = EvictLimits(max_error, min_gain)
    _check_options(limits, checkpoints_only, placeholder, keep_originals)
    check_place(device, workers)
    report = EvictReport()
    # Loading a base model to measure a gain may tell the store what it is, so that takes a writable store.
    with context.open(read_only=dry_run and min_gain is None) as store, reporting(report):
        chosen = select_tasks(store, tasks)
        evictor = Evictor(store, limits if placeholder else None, checkpoints_only=checkpoints_only, dry_run=dry_run)
        if not (keep_originals or dry_run):
            store.originals.check_alone()
        tell = context.counting(report.tasks, len(chosen))
        for base_model, of_base in groupby(chosen, key=lambda task: task.base_model):
            with nullcontext() if dry_run else store.job(base_model):
                checked: Iterator[tuple[TaskRecord, TaskEvicted | Evictable | Failed | None]]
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


def _check_options(limits: EvictLimits, checkpoints_only: bool, placeholder: bool, keep_originals: bool) -> None:
    """Refuse what would delete originals whatever their codes lose, or contradicts itself."""
    given = [limit for limit in (limits.max_error, limits.min_gain) if limit is not None]
    if keep_originals and not placeholder:
        raise OptionsConflict("--keep-originals needs --placeholder, because it deletes nothing")
    if keep_originals and given:
        raise OptionsConflict("--keep-originals deletes no originals, so it cannot be used with a limit")
    if placeholder and checkpoints_only and not keep_originals:
        hint = "add --keep-originals, or leave out --checkpoints-only"
        raise OptionsConflict("a checkpoint has no code, so it cannot be restored without its original", hint=hint)
    if not given and not keep_originals:
        hint = "use `--max-error 0.22` to limit the relative error, or `--min-gain 0.97` to limit the retained gain"
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
    limits: EvictLimits,
    checkpoints_only: bool,
    dry_run: bool,
) -> Iterator[tuple[TaskRecord, TaskEvicted | Evictable | Failed]]:
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


class Evictor:
    """Deletes originals that were checked, or only counts their bytes.

    Args:
        store: The store.
        limits: What the codes have to keep for which placeholders are left; None to leave none.
        checkpoints_only: Final adapters stay.
        dry_run: Nothing is deleted.
    """

    def __init__(self, store: Store, limits: EvictLimits | None, *, checkpoints_only: bool, dry_run: bool) -> None:
        self._store, self._limits = store, limits
        self._checkpoints_only, self._dry_run = checkpoints_only, dry_run
        self._folders, self._generator = Placeholders(store, dry_run=dry_run), OpenedGenerator()
        self._in_use = Counter(store.originals.in_use())

    def evict(self, name: str, made: TaskEvicted | Evictable | Failed | None) -> TaskEvicted:
        """Delete the originals of a task, or say why not; None where they are kept and only folders are freed."""
        if isinstance(made, Failed):
            return TaskEvicted(name, "kept", reason=made.error.message)
        try:
            if made is None:
                return self._replace(self._store.tasks.get(name))
            if isinstance(made, Evictable):
                return self._delete(name, made)
            if made.status != "known":
                return made
            # Its original was evicted before; its folder may still have the adapter.
            task, final = self._store.tasks.get(name), self._store.tasks.final(name)
            return replace(made, folders=self._folder_of(final, *current_code(self._store, task), is_checked=False))
        except TaskNotFound:  # `icm rm` does not wait for this job
            return TaskEvicted(name, "removed")

    def _delete(self, name: str, made: Evictable) -> TaskEvicted:
        rows, held_back = self._may_go(made.rows)
        figures = (made.code.size, made.squared_error, made.retained_gain)
        if not rows:
            return TaskEvicted(name, "kept", 0, 0, *figures, held_back, precision=made.precision)
        # First the folder: until its row says otherwise, the original can bring back what goes there.
        folders = self._folder_of(made.final, made.code, made.generator, is_checked=made.final in rows)
        expected, left = self._freed(rows)
        freed = expected
        try:
            if not self._dry_run:
                freed = self._store.originals.evict(made.order(rows))
        except (DamagedStore, LastCopy) as error:
            return TaskEvicted(name, "kept", 0, 0, made.code.size, reason=str(error), folders=folders)
        status: EvictStatus = "would_evict" if self._dry_run else "evicted"
        pending = expected - freed if self._store.blobs.is_remote else 0
        return TaskEvicted(name, status, len(rows), freed, *figures, held_back, folders, made.precision, left, pending)

    def _may_go(self, rows: Sequence[AdapterRecord]) -> tuple[list[AdapterRecord], str | None]:
        """Return the adapters that may go, and why others may not: nothing else brings a checkpoint back."""
        held_back = [row for row in rows if not row.is_final and self._folders.has_left(row)]
        if not held_back:
            return list(rows), None
        reason = f"a placeholder replaces it at {held_back[-1].source}, and a checkpoint has no code"
        return [row for row in rows if row not in held_back], f"{counted(len(held_back), 'checkpoint')} kept: {reason}"

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
            row, (code_now, _) = self._store.tasks.final(now.name), current_code(self._store, now)
            if (row.weights, row.config, code_now) != (final.weights, final.config, code):
                raise CheckFailed("the task changed while its code was being checked; run the same command again")
            if is_checked:
                check_bytes(self._store, final, [generator.blob, code.blob])
                return
            check_recorded(self._store, now, final, limits, code, generator)
            self._generator.get(generator.blob, self._store.blobs.read)  # it may be damaged

        def decoded() -> AdapterBytes | None:
            if code is None or generator is None:
                return None
            try:
                generator_file = self._generator.get(generator.blob, self._store.blobs.read)
                return files_of_code(self._store, generator_file, final, code)
            except FAILURES:  # the check says what is wrong with it
                return None

        left = self._folders.replace_files(final, RestoreSource(check, code, generator, decoded))
        return [] if left is None else [left]

    def _replace(self, task: TaskRecord) -> TaskEvicted:
        """Free the folders of a task, whose originals the store keeps."""
        if task.pinned:
            return TaskEvicted(task.name, "pinned")
        code, generator = current_code(self._store, task)
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
                raise CheckFailed("its original is no longer in the store")
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
