"""Evict originals that were checked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from icmlora.fleet.context import GeneratorCache
from icmlora.fleet.evict.check import Evictable, check_bytes, check_recorded, read_again
from icmlora.fleet.evict.placeholders import Placeholders
from icmlora.fleet.evict.types import CheckFailed, EvictLimits, EvictReport, FolderReplaced, TaskEvicted
from icmlora.fleet.failures import FAILURES, Failed
from icmlora.fleet.resources.decoding import files_of_code
from icmlora.fleet.resources.task_code import is_same_code
from icmlora.formats.format import AdapterBytes
from icmlora.io.text import counted
from registry.errors import DamagedStore, StoreFull, TaskNotFound
from registry.manifests import StoredAdapter, Task, now
from registry.reachability import count_uses

if TYPE_CHECKING:
    from registry.store import Store

_CHANGED = "the task changed while its code was being checked; run the same command again"


class Evictor:
    """Evicts originals that were checked, or only counts their bytes.

    Args:
        store: The store.
        limits: Limits of the codes for which placeholders are left; None to leave none.
        keep_originals: Only files in folders are replaced.
        checkpoints_only: Final adapters stay.
        dry_run: Nothing is deleted.
    """

    def __init__(
        self,
        store: Store,
        limits: EvictLimits | None,
        *,
        keep_originals: bool,
        checkpoints_only: bool,
        dry_run: bool,
    ) -> None:
        self._store, self._limits = store, limits
        self._checkpoints_only, self._dry_run = checkpoints_only, dry_run
        self._uses = Counter[str]() if keep_originals else count_uses(store)  # how often the manifests name each blob
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
        task, reason = checked.task, None
        # Nothing else restores a checkpoint.
        held_back = [one for one in checked.adapters if one is not task.final and self._folders.has_left(one)]
        adapters = [one for one in checked.adapters if one not in held_back]
        if held_back:
            fact = f"a placeholder replaces it at {held_back[-1].source}, and a checkpoint has no code"
            reason = f"{counted(len(held_back), 'checkpoint')} kept: {fact}"
        if not adapters:
            return replace(checked.result, status="kept", reason=reason)
        # First the folder: until the manifest says otherwise, the original can restore the files deleted there.
        is_final = any(one is task.final for one in adapters)
        folders = self._folder_of(task, checked if is_final else None)
        if not self._dry_run:
            try:
                self._record(checked, adapters)
            except (DamagedStore, CheckFailed) as error:
                size = checked.result.code_size
                return TaskEvicted(checked.result.task, "kept", code_size=size, reason=str(error), folders=folders)
        return replace(
            checked.result,
            status="would_evict" if self._dry_run else "evicted",
            adapters=len(adapters),
            freed=self._take(adapters),
            reason=reason,
            folders=folders,
        )

    def _record(self, checked: Evictable, adapters: Sequence[StoredAdapter]) -> None:
        """Record an eviction in the manifest. Works on a full disk.

        Raises:
            CheckFailed: The task is pinned, or no longer has the adapter and the code that were checked.
            DamagedStore: The code or the files it needs are damaged.
        """
        # Damage since the check would make these weights the last good copy.
        check_bytes(self._store, checked.task.final, [checked.code.generator, checked.code.blob])
        moment = now()
        files = {(one.weights, one.config, one.step) for one in adapters}

        def without_weights(adapter: StoredAdapter) -> StoredAdapter:
            is_chosen = not adapter.is_evicted and (adapter.weights, adapter.config, adapter.step) in files
            return replace(adapter, evicted_at=moment) if is_chosen else adapter

        def evicted(task: Task) -> Task:
            if task.pinned:
                raise CheckFailed("it was pinned while its code was being checked")
            final, code = checked.task.final, task.code
            is_same = task.final.is_same(final) and task.final.extras == final.extras
            if code is None or not is_same or not is_same_code(code, checked.code):
                raise CheckFailed(_CHANGED)
            return replace(
                task,
                final=without_weights(task.final),
                checkpoints=tuple(map(without_weights, task.checkpoints)),
                code=replace(code, squared_error=checked.result.squared_error),
                measured=task.with_measured(*checked.measured),
            )

        update = partial(self._store.update, checked.result.task, evicted)
        run = self._store.parts.maintenance.run
        try:
            run(update)
        except StoreFull:
            self._free()  # the files of earlier evictions
            run(update)

    def _take(self, adapters: Iterable[StoredAdapter]) -> int:
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

    def _folder_of(self, task: Task, checked: Evictable | None) -> list[FolderReplaced]:
        """Leave a placeholder for a task whose code replaces its original; `checked` if that was measured just now."""
        limits, final, code = self._limits, task.final, task.code
        if limits is None:
            return []

        def check() -> None:
            _, present = read_again(self._store, task)
            if not present.final.is_same(final) or not is_same_code(present.code, code):
                raise CheckFailed(_CHANGED)
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

        replaced = self._folders.replace_files(task, final, check, code, decoded)
        return [] if replaced is None else [replaced]

    def _replace(self, name: str, task: Task) -> TaskEvicted:
        """Free the folders of a task, whose originals the store keeps."""
        if task.pinned:
            return TaskEvicted(name, "pinned")
        folders: list[FolderReplaced] = []
        for adapter in task.checkpoints if self._checkpoints_only else task.adapters:
            code = task.code if adapter is task.final else None
            replaced = self._folders.replace_files(task, adapter, partial(self._check_original, adapter), code)
            folders += [] if replaced is None else [replaced]
        done = sum(folder.status in ("replaced", "would_replace") for folder in folders)
        if done:
            return TaskEvicted(name, "would_replace" if self._dry_run else "replaced", done, folders=folders)
        reason = next((folder.reason for folder in folders if folder.status == "left"), None)
        return TaskEvicted(name, "known" if reason is None else "kept", reason=reason, folders=folders)

    def _check_original(self, adapter: StoredAdapter) -> None:
        if adapter.is_evicted:
            raise CheckFailed("its original is no longer in the store")
        check_bytes(self._store, adapter, [adapter.weights])
