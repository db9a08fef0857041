"""Check that the code of a task can replace its original, as it is on disk. Any failure keeps the original.

code, generator              read, decoded and compared with the original
configuration                read, and compared with its digest
other tensors, such as heads read, unpacked and compared with the tensors of the original, byte for byte
files that came with it      read, and compared with their digests
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from icmlora.adapter.metrics import squared_error
from icmlora.errors import Cancelled, IcmLoraError
from icmlora.fleet.evict.types import NOT_MEASURED, CheckFailed, EvictLimits, EvictStatus, TaskEvicted
from icmlora.fleet.failures import FAILURES, as_error
from icmlora.fleet.measure.measure import losses_on_own_text
from icmlora.fleet.resources.decoding import check_references, decode_code, read_form
from icmlora.fleet.resources.loading import ModelCache, read_with_extras
from icmlora.fleet.resources.task_code import is_same_code
from icmlora.fleet.resources.workers import Tell
from icmlora.io.second_process import in_two_processes
from registry.errors import DamagedStore, StoreIOError, TaskNotFound
from registry.manifests import Adapter, Code, Measurement, Task

if TYPE_CHECKING:
    from registry.store import Store

_CHECKED_TOGETHER = 32
"""Tasks that a process takes at a time."""


@dataclass(frozen=True)
class Evictable:
    """A task whose code met the limits, and the originals that it can replace."""

    name: str  # `NAME@2` for an earlier version
    task: Task  # as it was checked
    code: Code
    adapters: tuple[Adapter, ...]
    squared_error: float
    retained_gain: float | None = None
    precision: str | None = None  # of the base model that the gain was measured on
    measured: tuple[Measurement, ...] = ()

    def without(self, adapters: Sequence[Adapter], task: Task, evicted_at: str) -> Task:
        """Return the task without the weights of some adapters.

        Raises:
            CheckFailed: The task is pinned, or no longer has the adapter and the code that were checked.
        """
        if task.pinned:
            raise CheckFailed("it was pinned while its code was being checked")
        final, code = self.task.final, task.code
        is_same = task.final.is_same(final) and task.final.extras == final.extras
        if code is None or not is_same or not is_same_code(code, self.code):
            raise CheckFailed("the task changed while its code was being checked; run the same command again")
        files = {(one.weights, one.config, one.step) for one in adapters}

        def without_weights(one: Adapter) -> Adapter:
            is_chosen = not one.is_evicted and (one.weights, one.config, one.step) in files
            return replace(one, evicted_at=evicted_at) if is_chosen else one

        return replace(
            task,
            final=without_weights(task.final),
            checkpoints=tuple(map(without_weights, task.checkpoints)),
            code=replace(code, squared_error=self.squared_error),
            measured=task.with_measured(*self.measured),
        )


def check_codes(
    models: ModelCache, tasks: Sequence[Task], tell: Tell, limits: EvictLimits, checkpoints_only: bool, dry_run: bool
) -> Iterator[tuple[Task, TaskEvicted | Evictable]]:
    """Check the codes of tasks of one base model, or report why they keep their originals; nothing is deleted."""
    checker = _Checker(models, limits, checkpoints_only)
    yield from checker.check_all(tasks[:1])  # it opens the generator for both processes
    if dry_run and limits.min_gain is None and not models.store.blobs.is_remote:
        parts = [tasks[at : at + _CHECKED_TOGETHER] for at in range(1, len(tasks), _CHECKED_TOGETHER)]
        yield from in_two_processes(checker.check_all, parts)
    else:  # a base model that measures gains is in memory once
        yield from checker.check_all(tasks[1:])


class _Checker:
    """Checks one task after the other, and deletes nothing."""

    def __init__(self, models: ModelCache, limits: EvictLimits, checkpoints_only: bool) -> None:
        self._models, self._store, self._limits = models, models.store, limits
        self._checkpoints_only = checkpoints_only

    def check_all(self, tasks: Sequence[Task]) -> Iterator[tuple[Task, TaskEvicted | Evictable]]:
        """Yield each task with its result."""
        for task in tasks:
            try:
                yield task, self._checked(*read_again(self._store, task))
            except TaskNotFound:  # `icm rm` does not wait for this job
                yield task, TaskEvicted(task.name, "removed")
            except DamagedStore as error:
                yield task, TaskEvicted(task.name, "kept", reason=str(error))

    def _checked(self, name: str, task: Task) -> TaskEvicted | Evictable:
        code = task.code
        adapters = task.checkpoints if self._checkpoints_only else task.adapters
        wanted = [one for one in adapters if not one.is_evicted]
        chosen = tuple(one for one in wanted if one.original_only is None)
        if task.pinned or not wanted:
            return _untouched(name, task)
        if task.not_encodable is not None:
            return TaskEvicted(name, "original_only", reason=task.not_encodable)
        if not chosen:
            return TaskEvicted(name, "original_only", reason=wanted[0].original_only)
        if code is None:
            return TaskEvicted(name, "kept", reason="it has no code; run `icm train --update` to make one")
        try:
            return self._measured(Evictable(name, task, code, chosen, math.nan))
        except Cancelled:
            raise
        except (IcmLoraError, DamagedStore, StoreIOError) as error:
            known = error if isinstance(error, CheckFailed) else CheckFailed(str(error))
            figures = (code.size, known.squared_error, known.retained_gain)
            return TaskEvicted(name, "kept", 0, 0, *figures, str(known), precision=known.precision)

    def _measured(self, checked: Evictable) -> Evictable:
        """Check a code, and the files that are kept in addition to it."""
        task = checked.task
        check_bytes(self._store, task.final)
        error = self._squared_error(task, checked.code)
        checked = replace(checked, squared_error=error)
        self._limits.check_error(error)
        if self._limits.min_gain is None:
            return checked
        if task.eval_data is None:
            raise CheckFailed("it has no held-out text, so its retained gain is unknown", error)
        try:
            losses = losses_on_own_text(self._models, task, checked.code.generator)
            # Measure everything again, also the original: this is the last time that it can be measured.
            results = losses.measure(("code",), again=True)
        except Cancelled:
            raise
        except FAILURES as failure:
            found = as_error(failure, self._models.loaded(task.base_model))
            raise CheckFailed(f"it cannot be measured: {found.message}", error) from failure
        gain = results["code"].retained_gain if "code" in results else None
        if gain is None:
            fact = "its original is no better than the base model on its held-out text, so there is no gain to keep"
            raise CheckFailed(fact, error)
        self._limits.check_gain(gain, error, losses.precision)
        measured = tuple(map(losses.record_of, results.values()))
        return replace(checked, retained_gain=gain, precision=losses.precision, measured=measured)

    def _squared_error(self, task: Task, code: Code) -> float:
        generator_file = self._models.generator_file(code.generator)
        original = None if task.final.is_evicted else read_with_extras(self._store, task.final)
        extras = {} if original is None else original.extras
        if original is not None and (task.final.extras or extras) and read_form(self._store, task).tensors != extras:
            raise CheckFailed("the tensors stored next to its code differ from the original tensors")
        try:
            decoded = decode_code(self._store, generator_file, code)
            # If only later checkpoints are left, the error measured when the final original was evicted still holds.
            error = code.squared_error if original is None else squared_error(original.adapter, decoded)
        except DamagedStore:
            raise
        except Exception as failure:  # nothing that a decoder does may cost the original
            fact = f"its code cannot be decoded: {type(failure).__name__}: {failure}"
            raise CheckFailed(fact) from failure
        if error is None:
            raise CheckFailed(NOT_MEASURED)
        if not math.isfinite(error):
            raise CheckFailed("the relative error of its code is not a finite number")
        return error


def _untouched(name: str, task: Task) -> TaskEvicted:
    """Return the result of a task that is pinned, or has nothing to evict, with the recorded figures of its code."""
    status: EvictStatus = "pinned" if task.pinned else "known"
    if task.code is None:
        return TaskEvicted(name, status)
    figures = (task.code.size, task.code.squared_error, _gain(task))
    return TaskEvicted(name, status, 0, 0, *figures, precision=_precision(task))


def read_again(store: Store, task: Task) -> tuple[str, Task]:
    """Return the name of a version of a task, `NAME@2` unless it is the current one, and its present state.

    Raises:
        TaskNotFound: It was removed.
    """
    current = store.task(task.name)
    if current.version == task.version:
        return current.name, current
    name = f"{current.name}@{task.version}"
    return name, store.task(name)


def _gain(task: Task) -> float | None:
    return None if task.quality is None else task.quality.retained_gain


def _precision(task: Task) -> str | None:
    return None if task.quality is None else task.quality.precision


def check_recorded(store: Store, task: Task, limits: EvictLimits) -> None:
    """Check the code of an evicted original by its recorded figures, and that it can still be decoded.

    Raises:
        CheckFailed: It misses a limit, or was not measured.
        DamagedStore: Bytes are missing or damaged.
    """
    code = task.code
    if code is None:
        raise CheckFailed("it has no code")
    limits.check_error(code.squared_error)
    limits.check_gain(_gain(task), code.squared_error, _precision(task))
    check_bytes(store, task.final, [code.generator, code.blob])
    check_references(store, task)


def check_bytes(store: Store, adapter: Adapter, source: Sequence[str] = ()) -> None:
    """Check all bytes that restore an adapter: its source, its configuration and its extras.

    Raises:
        DamagedStore: Bytes of its source are missing or damaged.
        CheckFailed: Bytes of its configuration or its extras are, or cannot be read.
    """
    for digest in source:
        store.blobs.check(digest)
    parts = [("its configuration", adapter.config)]
    parts += [(extra.file or "a tensor stored next to its code", extra.blob) for extra in adapter.extras]
    for what, digest in parts:
        try:
            store.blobs.check(digest)
        except (DamagedStore, StoreIOError) as error:
            raise CheckFailed(f"{what} could not be restored: {error}") from error
