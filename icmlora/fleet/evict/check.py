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
from icmlora.fleet.evict.types import NOT_MEASURED, CheckFailed, EvictLimits, TaskEvicted
from icmlora.fleet.failures import FAILURES, as_error
from icmlora.fleet.measure.measure import losses_on_own_text
from icmlora.fleet.resources.decoding import check_references, decode_code, read_form
from icmlora.fleet.resources.loading import ModelCache, read_with_extras
from icmlora.fleet.resources.workers import OnProgress
from icmlora.io.second_process import in_two_processes
from registry.errors import DamagedStore, StoreIOError, TaskNotFound
from registry.manifests import Code, Measurement, StoredAdapter, Task

if TYPE_CHECKING:
    from registry.store import Store

_CHECKED_TOGETHER = 32
"""Tasks that a process takes at a time."""


@dataclass(frozen=True)
class Evictable:
    """A task whose code met the limits, and the originals that it can replace."""

    result: TaskEvicted  # with the measured figures; nothing is evicted yet
    task: Task  # as it was checked
    code: Code
    adapters: tuple[StoredAdapter, ...]
    measured: tuple[Measurement, ...] = ()


def check_codes(
    models: ModelCache,
    tasks: Sequence[Task],
    on_progress: OnProgress,
    limits: EvictLimits,
    checkpoints_only: bool,
    dry_run: bool,
) -> Iterator[tuple[Task, TaskEvicted | Evictable]]:
    """Check the codes of tasks of one base model, or report why they keep their originals; nothing is deleted."""

    def check_all(some: Sequence[Task]) -> Iterator[tuple[Task, TaskEvicted | Evictable]]:
        for task in some:
            try:
                yield task, _check_task(models, *read_again(models.store, task), limits, checkpoints_only)
            except TaskNotFound:  # `icm rm` does not wait for this job
                yield task, TaskEvicted(task.name, "removed")
            except DamagedStore as error:
                yield task, TaskEvicted(task.name, "kept", reason=str(error))

    yield from check_all(tasks[:1])  # it opens the generator for both processes
    if dry_run and limits.min_gain is None and not models.store.blobs.is_remote:
        parts = [tasks[at : at + _CHECKED_TOGETHER] for at in range(1, len(tasks), _CHECKED_TOGETHER)]
        yield from in_two_processes(check_all, parts)
    else:  # a base model that measures gains is in memory once
        yield from check_all(tasks[1:])


def _check_task(
    models: ModelCache, name: str, task: Task, limits: EvictLimits, checkpoints_only: bool
) -> TaskEvicted | Evictable:
    """Check a code, and the files that are kept in addition to it. `name` is `NAME@2` for an earlier version."""
    code = task.code
    present = [one for one in (task.checkpoints if checkpoints_only else task.adapters) if not one.is_evicted]
    chosen = tuple(one for one in present if one.original_only is None)
    if task.pinned or not present:
        untouched = TaskEvicted(name, "pinned" if task.pinned else "known")
        if code is None:
            return untouched
        gain, precision = _recorded_gain(task)
        return replace(
            untouched,
            code_size=code.size,
            squared_error=code.squared_error,
            retained_gain=gain,
            precision=precision,
        )
    if task.not_encodable is not None or not chosen:
        return TaskEvicted(name, "original_only", reason=task.not_encodable or present[0].original_only)
    if code is None:
        return TaskEvicted(name, "kept", reason="it has no code; run `icm train --update` to make one")
    result, measured = TaskEvicted(name, "would_evict", code_size=code.size), tuple[Measurement, ...]()
    try:
        check_bytes(models.store, task.final)
        error = _squared_error(models, task, code)
        result = replace(result, squared_error=error)
        limits.check_error(error)
        if limits.min_gain is not None:
            if task.eval_data is None:
                raise CheckFailed("it has no held-out text, so its retained gain is unknown")
            try:
                losses = losses_on_own_text(models, task, code.generator)
                # Measure everything again, also the original: this is the last time that it can be measured.
                results = losses.measure(("code",), again=True)
            except Cancelled:
                raise
            except FAILURES as failure:
                fact = as_error(failure, models.loaded(task.base_model)).message
                raise CheckFailed(f"it cannot be measured: {fact}") from failure
            gain = results["code"].retained_gain if "code" in results else None
            if gain is None:
                fact = "its original is no better than the base model on its held-out text"
                raise CheckFailed(f"{fact}, so there is no gain to keep")
            result = replace(result, retained_gain=gain, precision=losses.precision)
            limits.check_gain(gain, losses.precision)
            measured = tuple(map(losses.record_of, results.values()))
    except Cancelled:
        raise
    except (IcmLoraError, DamagedStore, StoreIOError) as failure:
        return replace(result, status="kept", reason=str(failure))
    return Evictable(result, task, code, chosen, measured)


def _squared_error(models: ModelCache, task: Task, code: Code) -> float:
    """Read the code back from disk, decode it, and measure its error."""
    store, generator_file = models.store, models.generator_file(code.generator)
    original = None if task.final.is_evicted else read_with_extras(store, task.final)
    extras = {} if original is None else original.extras
    if original is not None and (task.final.extras or extras) and read_form(store, task).tensors != extras:
        raise CheckFailed("the tensors stored next to its code differ from the original tensors")
    try:
        decoded = decode_code(store, generator_file, code)
        # If only later checkpoints are left, the error measured when the final original was evicted still holds.
        error = code.squared_error if original is None else squared_error(original.adapter, decoded)
    except DamagedStore:
        raise
    except Exception as failure:  # nothing that a decoder does may cost the original
        raise CheckFailed(f"its code cannot be decoded: {type(failure).__name__}: {failure}") from failure
    if error is None:
        raise CheckFailed(NOT_MEASURED)
    if not math.isfinite(error):
        raise CheckFailed("the relative error of its code is not a finite number")
    return error


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


def _recorded_gain(task: Task) -> tuple[float | None, str | None]:
    return (None, None) if task.quality is None else (task.quality.retained_gain, task.quality.precision)


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
    limits.check_gain(*_recorded_gain(task))
    check_bytes(store, task.final, [code.generator, code.blob])
    check_references(store, task)


def check_bytes(store: Store, adapter: StoredAdapter, source: Sequence[str] = ()) -> None:
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
