"""Check that the code of a task can replace its original, as it is on disk. Any failure keeps the original.

code, generator              read, decoded and measured against the original
configuration                read, and compared with its digest
other tensors, such as heads read, unpacked and compared with those of the original, byte for byte
files that came with it      read, and compared with their digests
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import chain
from typing import TYPE_CHECKING

from icmlora.adapter.metrics import squared_error
from icmlora.errors import Cancelled, IcmLoraError
from icmlora.fleet.evict.types import NOT_MEASURED, CheckFailed, EvictLimits, EvictStatus, TaskEvicted
from icmlora.fleet.failures import FAILURES, as_error
from icmlora.fleet.measure.measure import losses_on_own_text
from icmlora.fleet.resources.decoding import check_references, decode_code, read_form
from icmlora.fleet.resources.loading import Models, read_with_extras
from icmlora.fleet.resources.workers import Tell
from icmlora.io.second_process import in_two_processes
from registry.errors import DamagedStore, StoreIOError, TaskNotFound
from registry.records import (
    AdapterRecord,
    CodeRecord,
    Eviction,
    GeneratorRecord,
    NewEvaluation,
    TaskRecord,
    latest_evaluation,
)

if TYPE_CHECKING:
    from registry.store import Store

_READ_TOGETHER = 32
"""Tasks whose rows are read at once."""


@dataclass(frozen=True)
class Evictable:
    """Originals of a task whose code met the limits, and what was measured of it."""

    rows: Sequence[AdapterRecord]
    final: AdapterRecord  # one of the rows, or evicted before
    code: CodeRecord
    generator: GeneratorRecord
    squared_error: float
    retained_gain: float | None = None
    precision: str | None = None  # of the base model that the gain was measured on
    evaluations: tuple[NewEvaluation, ...] = ()

    def order(self, rows: Sequence[AdapterRecord]) -> Eviction:
        """Return what the store has to do to delete some of the originals."""
        numbers, measured = [row.id for row in rows], (self.squared_error, self.evaluations)
        return Eviction(self.final.task, numbers, self.final, self.code, self.generator, *measured)


def check_codes(
    models: Models,
    tasks: Sequence[TaskRecord],
    tell: Tell,
    limits: EvictLimits,
    checkpoints_only: bool,
    dry_run: bool,
    interrupted: frozenset[str],
) -> Iterator[tuple[TaskRecord, TaskEvicted | Evictable]]:
    """Check the codes of tasks of one base model, or say why they keep their originals; nothing is deleted."""
    yield from _Checker(models, limits, checkpoints_only, dry_run, interrupted).each(tasks)


class _Checker:
    """Checks one task after the other, and deletes nothing."""

    def __init__(
        self, models: Models, limits: EvictLimits, checkpoints_only: bool, dry_run: bool, interrupted: frozenset[str]
    ) -> None:
        self._models, self._store, self._limits, self._interrupted = models, models.store, limits, interrupted
        self._checkpoints_only, self._dry_run = checkpoints_only, dry_run
        self._generator = cache(models.store.generators.current)  # of all tasks of a base model

    def each(self, tasks: Sequence[TaskRecord]) -> Iterator[tuple[TaskRecord, TaskEvicted | Evictable]]:
        """Check tasks of one base model; the rows of many are read at once, which takes a fraction of the time."""
        # A deletion lets others change what was read before it.
        size = _READ_TOGETHER if self._dry_run else 1
        parts = [tasks[at : at + size] for at in range(1, len(tasks), size)]
        yield from self._together(tasks[:1])  # it opens the generator for all
        if self._dry_run and self._limits.min_gain is None and not self._store.blobs.is_remote:
            yield from in_two_processes(self._together, parts)
        else:  # a base model that measures gains is in memory once
            yield from chain.from_iterable(map(self._together, parts))

    def _together(self, tasks: Sequence[TaskRecord]) -> Iterator[tuple[TaskRecord, TaskEvicted | Evictable]]:
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
    ) -> TaskEvicted | Evictable:
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
            return TaskEvicted(task.name, "kept", reason="it has no code; run `icm train --update` to make one")
        final = adapters[-1]
        try:
            # A row may say "evicted" for another reason than an interrupted run: what is there decides.
            present = replace(final, evicted_at=None) if final in there else final
            return replace(self._measured(task, present, code, generator), rows=chosen, final=final)
        except Cancelled:
            raise
        except (IcmLoraError, DamagedStore, StoreIOError) as error:
            known = error if isinstance(error, CheckFailed) else CheckFailed(str(error))
            figures = (code.size, known.squared_error, known.retained_gain)
            reason = str(known)
            if any(row.is_evicted for row in chosen):  # although their weights are there
                reason = f"an interrupted eviction left its weights, which are kept: {reason}"
            return TaskEvicted(task.name, "kept", 0, 0, *figures, reason, precision=known.precision)

    def _untouched(self, task: TaskRecord, code: CodeRecord | None, generator: GeneratorRecord | None) -> TaskEvicted:
        status: EvictStatus = "pinned" if task.pinned else "known"
        if code is None or generator is None:
            return TaskEvicted(task.name, status)
        gain, precision = recorded_gain(self._store, task, code, generator)
        figures = (code.size, code.squared_error, gain)
        return TaskEvicted(task.name, status, 0, 0, *figures, precision=precision)

    def _measured(
        self, task: TaskRecord, final: AdapterRecord, code: CodeRecord, generator: GeneratorRecord
    ) -> Evictable:
        """Check a code, and what is kept in addition to it."""
        check_bytes(self._store, final)
        error = self._squared_error(final, code, generator)
        checked = Evictable((), final, code, generator, error)
        self._limits.check_error(error)
        if self._limits.min_gain is None:
            return checked
        if task.eval_data is None:
            raise CheckFailed("it has no held-out text, so its retained gain is unknown", error)
        try:
            losses = losses_on_own_text(self._store, self._models, task, generator)
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
        rows = tuple(map(losses.record_of, results.values()))
        return replace(checked, retained_gain=gain, precision=losses.precision, evaluations=rows)

    def _squared_error(self, final: AdapterRecord, code: CodeRecord, generator: GeneratorRecord) -> float:
        generator_file = self._models.generator_file(generator)
        original = None if final.is_evicted else read_with_extras(self._store, final)
        extras = {} if original is None else original.extras
        if original is not None and (final.extras or extras) and read_form(self._store, final).tensors != extras:
            raise CheckFailed("the tensors stored next to its code differ from the original tensors")
        try:
            decoded = decode_code(self._store, generator_file, code)
            # If only later checkpoints are left, what was measured when the final original went still holds.
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


def recorded_gain(
    store: Store, task: TaskRecord, code: CodeRecord, generator: GeneratorRecord
) -> tuple[float | None, str | None]:
    """Return the retained gain that was measured of a code, if it was, and in which precision of the base model."""
    found = latest_evaluation(store.evaluations.all(task.name), task, "code", generator)
    return (None, None) if found is None else (found.retained_gain, found.precision)


def check_recorded(
    store: Store,
    task: TaskRecord,
    final: AdapterRecord,
    limits: EvictLimits,
    code: CodeRecord,
    generator: GeneratorRecord,
) -> None:
    """Check the code of an original that is gone by what was measured of it, and that it can still be decoded.

    Raises:
        CheckFailed: It misses a limit, or was not measured.
        DamagedStore: Bytes are missing or damaged.
    """
    limits.check_error(code.squared_error)
    gain, precision = recorded_gain(store, task, code, generator)
    limits.check_gain(gain, code.squared_error, precision)
    check_bytes(store, final, [generator.blob, code.blob])
    check_references(store, final)


def check_bytes(store: Store, row: AdapterRecord, source: Sequence[str] = ()) -> None:
    """Check all bytes that bring an adapter back: those of its source, its configuration and its extras.

    Raises:
        DamagedStore: Bytes of its source are missing or damaged.
        CheckFailed: Bytes of its configuration or its extras are, or cannot be read.
    """
    for digest in source:
        store.blobs.check(digest)
    parts = [("its configuration", row.config)]
    parts += [(extra.file or "a tensor stored next to its code", extra.blob) for extra in row.extras]
    for what, digest in parts:
        try:
            store.blobs.check(digest)
        except (DamagedStore, StoreIOError) as error:
            raise CheckFailed(f"{what} could not be restored: {error}") from error
