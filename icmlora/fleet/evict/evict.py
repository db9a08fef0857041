"""Delete originals, each after a check that its code can replace it.

    pinned? ──▶ code? ──▶ read back from disk, decoded, measured ──▶ the manifest says "evicted" ──▶ files are freed
       └────────────────┴────────────────────┴──▶ kept, with the reason

    with placeholder    before that: the adapter in the user's folder is replaced by a placeholder
    keep_originals      only the folder: nothing in the store is deleted, and no code is needed

Each eviction is durable before it is reported. A kill never loses an original that was not checked. The files are freed
together at the end; if another process uses the store, by the next `icm prune`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from itertools import groupby
from typing import TYPE_CHECKING

from icmlora.errors import Cancelled, OptionsConflict
from icmlora.fleet.context import Context, GeneratorCache, reporting, select_tasks, use_case
from icmlora.fleet.evict.check import Evictable, check_bytes, check_codes, check_recorded, read_again
from icmlora.fleet.evict.placeholders import FolderReplaced, Placeholders, RestoreSource
from icmlora.fleet.evict.types import CheckFailed, EvictLimits, EvictReport, EvictStatus, TaskEvicted
from icmlora.fleet.failures import FAILURES, Failed
from icmlora.fleet.resources.decoding import files_of_code
from icmlora.fleet.resources.task_code import is_same_code
from icmlora.fleet.resources.workers import Tell, check_place, worker_pool
from icmlora.formats.format import AdapterBytes
from icmlora.io.text import counted
from registry.errors import DamagedStore, StoreFull, TaskNotFound
from registry.manifests import Adapter, Task, now
from registry.reachability import count_uses

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
        tasks: Names of tasks, or of versions as `NAME@2`; the current versions of all tasks by default.
        max_error: Largest relative error, ||dW' - dW|| / ||dW||: 0.3 for 30 %.
        min_gain: Smallest retained gain on the task's held-out text. Needs the base model.
        checkpoints_only: Delete checkpoints and keep the final adapters.
        placeholder: Also replace the adapter in the folder it was ingested from by a placeholder, if its files
            are unchanged; `restore` brings it back.
        keep_originals: With `placeholder`: delete nothing in the store, so that `restore` is exact.
        dry_run: Check everything and delete nothing.
        device: Where to measure.
        workers: Where to check, as described for `Fleet`.

    Raises:
        OptionsConflict: There is no limit, or the arguments contradict each other.
        DamagedStore: The database disagrees with the manifests; nothing was evicted.
    """
    limits = EvictLimits(max_error, min_gain)
    _check_options(limits, checkpoints_only, placeholder, keep_originals)
    check_place(device, workers)
    report = EvictReport()
    # Loading a base model to measure a gain may record its fingerprint, so that takes a writable store.
    with context.open(read_only=dry_run and min_gain is None) as store, reporting(report):
        chosen = select_tasks(store, tasks)
        uses = Counter[str]() if keep_originals else count_uses(store)
        kept = limits if placeholder else None
        evictor = Evictor(store, uses, kept, checkpoints_only=checkpoints_only, dry_run=dry_run)
        tell = context.counting(report.tasks, len(chosen))
        try:
            for base_model, of_base in groupby(chosen, key=lambda task: task.base_model):
                with nullcontext() if dry_run else store.job(base_model):
                    checked: Iterator[tuple[Task, TaskEvicted | Evictable | Failed | None]]
                    if keep_originals:
                        checked = ((task, None) for task in of_base)
                    else:
                        checked = _checked(
                            context, store, list(of_base), device, workers, tell, limits, checkpoints_only, dry_run
                        )
                    for task, result in checked:
                        done = evictor.evict(task, result)
                        report.tasks.append(done)
                        is_named = done.status in ("pinned", "original_only") and bool(tasks)
                        report.partly |= done.is_partial or is_named
                        context.on_event(done)
                        tell(done.task)
        except Cancelled:
            evictor.free(report)
            raise
        evictor.free(report)
    return report


def _check_options(limits: EvictLimits, checkpoints_only: bool, placeholder: bool, keep_originals: bool) -> None:
    """Refuse options that set no limit for what is deleted, or that contradict each other."""
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
    tasks: Sequence[Task],
    device: str,
    workers: str | None,
    tell: Tell,
    limits: EvictLimits,
    checkpoints_only: bool,
    dry_run: bool,
) -> Iterator[tuple[Task, TaskEvicted | Evictable | Failed]]:
    """Check the codes of tasks of one base model."""
    with worker_pool(context, store, device=device, workers=workers) as pool:
        yield from pool.each(check_codes, tasks, tell, limits, checkpoints_only, dry_run)


class Evictor:
    """Evicts originals that were checked, or only counts their bytes.

    Args:
        store: The store.
        uses: How often the manifests name each blob.
        limits: Limits of the codes for which placeholders are left; None to leave none.
        checkpoints_only: Final adapters stay.
        dry_run: Nothing is deleted.
    """

    def __init__(
        self, store: Store, uses: Counter[str], limits: EvictLimits | None, *, checkpoints_only: bool, dry_run: bool
    ) -> None:
        self._store, self._uses, self._limits = store, uses, limits
        self._checkpoints_only, self._dry_run = checkpoints_only, dry_run
        self._folders, self._generator = Placeholders(store, dry_run=dry_run), GeneratorCache()
        self._unneeded = dict[str, int]()  # files to free, with their sizes
        self._freed = 0

    def evict(self, task: Task, checked: TaskEvicted | Evictable | Failed | None) -> TaskEvicted:
        """Evict the originals of a task, or return the reason not to; None only replaces files in its folders."""
        if isinstance(checked, Failed):
            return TaskEvicted(task.name, "kept", reason=checked.error.message)
        try:
            if checked is None:
                return self._replace(*read_again(self._store, task))
            if isinstance(checked, Evictable):
                return self._evict(checked)
            if checked.status != "known":
                return checked
            # Its original was evicted before; its files, or its folder, may still be there.
            _, present = read_again(self._store, task)
            gone = [one for one in present.adapters if one.is_evicted]
            left = 0 if self._store.blobs.is_remote else self._take(gone)
            return replace(checked, left=left, folders=self._folder_of(present, None))
        except TaskNotFound:  # `icm rm` does not wait for this job
            return TaskEvicted(task.name, "removed")

    def free(self, report: EvictReport) -> None:
        """Delete the files of evicted originals that nothing else needs, and report the bytes left for `prune`."""
        if not self._dry_run:
            report.is_in_use = not self._free()
            report.pending = sum(self._unneeded.values()) - self._freed

    def _free(self) -> bool:
        """Free the files of the evictions so far; return False if another process uses the store."""
        freed = self._store.free(self._unneeded) if self._unneeded else 0
        self._freed += freed or 0
        return freed is not None

    def _evict(self, checked: Evictable) -> TaskEvicted:
        adapters, held_back = self._without_placeholders(checked.task, checked.adapters)
        figures = (checked.code.size, checked.squared_error, checked.retained_gain)
        if not adapters:
            return TaskEvicted(checked.name, "kept", 0, 0, *figures, held_back, precision=checked.precision)
        # First the folder: until the manifest says otherwise, the original can restore the files deleted there.
        is_final = any(one is checked.task.final for one in adapters)
        folders = self._folder_of(checked.task, checked if is_final else None)
        status: EvictStatus = "would_evict"
        if not self._dry_run:
            try:
                self._record(checked, adapters)
            except (DamagedStore, CheckFailed) as error:
                return TaskEvicted(checked.name, "kept", 0, 0, checked.code.size, reason=str(error), folders=folders)
            status = "evicted"
        freed = self._take(adapters)
        return TaskEvicted(
            checked.name, status, len(adapters), freed, *figures, held_back, folders, precision=checked.precision
        )

    def _record(self, checked: Evictable, adapters: Sequence[Adapter]) -> None:
        """Record an eviction in the manifest. Works on a full disk."""
        # Damage since the check would make these weights the last good copy.
        check_bytes(self._store, checked.task.final, [checked.code.generator, checked.code.blob])
        moment = now()

        def update() -> Task:
            return self._store.update(checked.name, lambda task: checked.without(adapters, task, moment))

        run = self._store.parts.maintenance.run
        try:
            run(update)
        except StoreFull:
            self._free()  # the files of earlier evictions
            run(update)

    def _take(self, adapters: Iterable[Adapter]) -> int:
        """Plan to free the files of evicted adapters; return the bytes of those that nothing else needs."""
        freed = 0
        for adapter in adapters:
            for file in adapter.evictable:
                self._uses[str(file)] -= not adapter.is_evicted
                is_unneeded = self._uses[str(file)] <= 0 and str(file) not in self._unneeded
                if is_unneeded and self._store.blobs.exists(file):
                    self._unneeded[str(file)] = file.size
                    freed += file.size
        return freed

    def _without_placeholders(self, task: Task, adapters: Sequence[Adapter]) -> tuple[list[Adapter], str | None]:
        """Return the adapters to evict, and why others stay: nothing else restores a checkpoint."""
        held_back = [one for one in adapters if one is not task.final and self._folders.has_left(one)]
        if not held_back:
            return list(adapters), None
        reason = f"a placeholder replaces it at {held_back[-1].source}, and a checkpoint has no code"
        kept = f"{counted(len(held_back), 'checkpoint')} kept: {reason}"
        return [one for one in adapters if one not in held_back], kept

    def _folder_of(self, task: Task, checked: Evictable | None) -> list[FolderReplaced]:
        """Leave a placeholder for a task whose code replaces its original; `checked` if that was measured just now."""
        limits, final, code = self._limits, task.final, task.code
        if limits is None:
            return []

        def check() -> None:
            _, present = read_again(self._store, task)
            if not present.final.is_same(final) or not is_same_code(present.code, code):
                raise CheckFailed("the task changed while its code was being checked; run the same command again")
            if code is not None and checked is not None:
                check_bytes(self._store, final, [code.generator, code.blob])
            else:
                check_recorded(self._store, present, limits)
            if code is not None:
                self._generator.get(code.generator, self._store.blobs.read)  # it may be damaged

        def decoded() -> AdapterBytes | None:
            if code is None:
                return None
            try:
                return files_of_code(self._store, self._generator.get(code.generator, self._store.blobs.read), task)
            except FAILURES:  # the check reports it
                return None

        replaced = self._folders.replace_files(task, final, RestoreSource(check, code, decoded))
        return [] if replaced is None else [replaced]

    def _replace(self, name: str, task: Task) -> TaskEvicted:
        """Free the folders of a task, whose originals the store keeps."""
        if task.pinned:
            return TaskEvicted(name, "pinned")
        adapters = task.checkpoints if self._checkpoints_only else task.adapters
        replaced = [self._folder_with_original(task, one) for one in adapters]
        folders = [folder for folder in replaced if folder is not None]
        done = sum(folder.status in ("replaced", "would_replace") for folder in folders)
        if done:
            return TaskEvicted(name, "would_replace" if self._dry_run else "replaced", done, folders=folders)
        reason = next((folder.reason for folder in folders if folder.status == "left"), None)
        return TaskEvicted(name, "known" if reason is None else "kept", reason=reason, folders=folders)

    def _folder_with_original(self, task: Task, adapter: Adapter) -> FolderReplaced | None:
        def check() -> None:
            if adapter.is_evicted:
                raise CheckFailed("its original is no longer in the store")
            check_bytes(self._store, adapter, [adapter.weights])

        code = task.code if adapter is task.final else None
        return self._folders.replace_files(task, adapter, RestoreSource(check, code))
