"""Delete originals, each after a check that its code can replace it.

    pinned? ──▶ code (and residual)? ──▶ read back from disk, decoded, measured ──▶ evicted (rows, then files)
       └────────────────┴────────────────────┴──▶ kept, with the reason

Each eviction is durable before it is reported. A kill never loses an original that was not checked, and the same
command continues.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING, Literal

from icmlora.adapter.metrics import squared_error
from icmlora.errors import Cancelled, DataError, IcmLoraError
from icmlora.fleet.context import Context, Event, reporting, select_tasks
from icmlora.fleet.decoding import check_references, decode_code
from icmlora.fleet.failures import FAILURES, Failed, as_error
from icmlora.fleet.loading import Models, read_original
from icmlora.fleet.measure import losses_on_own_text
from icmlora.fleet.workers import check_place, open_workers
from registry.errors import DamagedStore, LastCopy, TaskNotFound
from registry.evaluations import latest
from registry.records import (
    AdapterRecord,
    CodeRecord,
    Eviction,
    GeneratorRecord,
    NewEvaluation,
    TaskRecord,
    WithRelativeError,
)

if TYPE_CHECKING:
    from registry.store import Store

EvictStatus = Literal["evicted", "would_evict", "kept", "original_only", "pinned", "known", "removed"]


@dataclass(frozen=True)
class EvictRequest:
    """What to evict, and which limits the codes must meet; at least one is given."""

    names: Sequence[str] = ()
    max_error: float | None = None
    min_gain: float | None = None
    checkpoints_only: bool = False
    dry_run: bool = False
    device: str = "auto"
    workers: str | None = None


@dataclass(frozen=True)
class TaskEvicted(WithRelativeError, Event):
    """One task is done."""

    task: str
    # `evicted`; `would_evict` in a dry run; `kept` (see `reason`); `original_only` (there can be no code, see
    # `reason`); `pinned`; `known` (nothing was left to evict); `removed` (by another process, meanwhile).
    status: EvictStatus
    adapters: int = 0
    freed: int = 0  # their bytes on disk; a file that another task needs frees nothing
    code_size: int | None = None  # bytes of the code that replaces them
    residual_size: int | None = None  # bytes of its residual, if there is one
    squared_error: float | None = None
    retained_gain: float | None = None
    reason: str | None = None


@dataclass
class EvictReport:
    """What was deleted, or would be."""

    tasks: list[TaskEvicted] = field(default_factory=list)
    left: int = 0  # bytes of files that an interrupted eviction had left
    # Whether an original was kept that was meant to go: it misses a limit, or its task is named, and pinned or
    # original only.
    partly: bool = False

    @property
    def gone(self) -> list[TaskEvicted]:
        """The tasks whose originals were deleted, or would be."""
        return [task for task in self.tasks if task.status in ("evicted", "would_evict")]

    @property
    def kept(self) -> list[TaskEvicted]:
        """The tasks that miss a limit."""
        return [task for task in self.tasks if task.status == "kept"]

    @property
    def original_only(self) -> list[TaskEvicted]:
        """The tasks of which there can be no code."""
        return [task for task in self.tasks if task.status == "original_only"]

    @property
    def freed(self) -> int:
        """All bytes that were freed, or would be."""
        return self.left + sum(task.freed for task in self.tasks)


def evict(context: Context, request: EvictRequest) -> EvictReport:
    """Evict the originals of some tasks, or say what would be evicted."""
    _check_limits(request)
    check_place(request.device, request.workers)
    report = EvictReport()
    # Loading a base model to measure a gain may tell the store what it is, so that takes a writable store.
    read_only = request.dry_run and request.min_gain is None
    with context.open(read_only=read_only) as store, reporting(report):
        tasks = select_tasks(store, request.names)
        evictor = Evictor(store, request)
        report.left = store.originals.finish_evictions(dry_run=request.dry_run)
        context.progress(0, len(tasks))

        def tell(note: str) -> None:
            context.progress(len(report.tasks), len(tasks), note)

        for base_model, of_base in groupby(tasks, key=lambda task: task.base_model):
            with nullcontext() if request.dry_run else store.job(base_model):
                for task, made in _checked(context, store, request, list(of_base), tell):
                    done = evictor.evict(task.name, made)
                    report.tasks.append(done)
                    meant = done.status in ("pinned", "original_only") and bool(request.names)
                    report.partly |= done.status == "kept" or meant
                    context.on_event(done)
                    tell(task.name)
    return report


def _checked(
    context: Context, store: Store, request: EvictRequest, tasks: Sequence[TaskRecord], tell: Callable[[str], None]
) -> Iterator[tuple[TaskRecord, TaskEvicted | _Evictable | Failed]]:
    """Check the codes of tasks of one base model."""
    make = partial(_Checker, request)
    with open_workers(context, store, make, device=request.device, workers=request.workers) as workers:
        found = workers.each(tasks, tell)
        if request.workers is None:
            yield from found
            return
        checked = list(found)
    # Only now: a deletion waits until no other process has the store open, and the workers had.
    yield from checked


def _check_limits(request: EvictRequest) -> None:
    """Refuse a request that would delete originals whatever their codes lose."""
    limits = [limit for limit in (request.max_error, request.min_gain) if limit is not None]
    if not limits or not all(map(math.isfinite, limits)):
        raise DataError("evicting takes a limit that is a finite number", hint="give max_error or min_gain, or both")


@dataclass(frozen=True)
class _Evictable:
    """Originals of a task whose code was checked."""

    order: Eviction
    rows: Sequence[AdapterRecord]
    gain: float | None  # the retained gain of the code, if it was measured


class _Checker:
    """Checks one task after the other, and deletes nothing."""

    def __init__(self, request: EvictRequest, models: Models) -> None:
        self._store, self._request = models.store, request
        self._check = _EvictionCheck(models.store, models, request.max_error, request.min_gain)

    def __call__(self, task: TaskRecord, tell: Callable[[str], None]) -> TaskEvicted | _Evictable:
        """Check one task, or say why it keeps its originals."""
        try:
            return self._checked(self._store.tasks.get(task.name))
        except TaskNotFound:  # `icm rm` does not wait for this job
            return TaskEvicted(task.name, "removed")

    def _checked(self, task: TaskRecord) -> TaskEvicted | _Evictable:
        adapters = self._store.tasks.adapters(task.name)
        wanted = [row for row in adapters if not (row.is_evicted or (row.is_final and self._request.checkpoints_only))]
        chosen = [row for row in wanted if row.original_only is None]
        generator = self._store.generators.current(task.base_model)
        code = None if generator is None else self._store.codes.get(task.name, generator.id)
        if task.pinned or not wanted:
            return self._untouched(task, code, generator)
        if adapters[-1].original_only is not None:
            return TaskEvicted(task.name, "original_only", reason=adapters[-1].original_only)
        if not chosen:
            return TaskEvicted(task.name, "original_only", reason=wanted[0].original_only)
        if code is None or generator is None:
            return TaskEvicted(task.name, "kept", reason="it has no code; `icm train --update` makes one")
        try:
            checked = self._check.run(task, adapters[-1], code, generator)
        except _CheckFailed as error:
            figures = (*_sizes(code), error.squared_error, error.retained_gain)
            return TaskEvicted(task.name, "kept", 0, 0, *figures, str(error))
        except Cancelled:
            raise
        except (IcmLoraError, DamagedStore) as error:
            return TaskEvicted(task.name, "kept", 0, 0, *_sizes(code), reason=str(error))
        numbers = [row.id for row in chosen]
        order = Eviction(task.name, numbers, code, generator, checked.squared_error, checked.evaluations)
        return _Evictable(order, chosen, checked.retained_gain)

    def _untouched(self, task: TaskRecord, code: CodeRecord | None, generator: GeneratorRecord | None) -> TaskEvicted:
        status: EvictStatus = "pinned" if task.pinned else "known"
        if code is None or generator is None:
            return TaskEvicted(task.name, status)
        found = latest(self._store.evaluations.all(task.name), task, code.rung, generator)
        gain = None if found is None else found.retained_gain
        return TaskEvicted(task.name, status, 0, 0, *_sizes(code), code.best_squared_error, gain)


class Evictor:
    """Deletes originals that were checked, or only counts their bytes."""

    def __init__(self, store: Store, request: EvictRequest) -> None:
        self._store, self._request = store, request
        self._in_use = Counter(store.originals.in_use())

    def evict(self, name: str, made: TaskEvicted | _Evictable | Failed) -> TaskEvicted:
        """Delete the originals of a task, or say why not."""
        if isinstance(made, TaskEvicted):
            return made
        if isinstance(made, Failed):
            return TaskEvicted(name, "kept", reason=made.error.message)
        order, sizes = made.order, _sizes(made.order.code)
        try:
            freed = self._freed(made.rows)
            if not self._request.dry_run:
                freed = self._store.originals.evict(order)
        except TaskNotFound:  # `icm rm` does not wait for this job
            return TaskEvicted(name, "removed")
        except (DamagedStore, LastCopy) as error:
            return TaskEvicted(name, "kept", 0, 0, *sizes, reason=str(error))
        status: EvictStatus = "would_evict" if self._request.dry_run else "evicted"
        return TaskEvicted(name, status, len(made.rows), freed, *sizes, order.squared_error, made.gain)

    def _freed(self, chosen: Sequence[AdapterRecord]) -> int:
        """Return the bytes of the files that are deleted with some adapters; several adapters may share one."""
        freed = 0
        for row in chosen:
            for digest, size in row.evictable.items():
                self._in_use[digest] -= 1
                freed += 0 if self._in_use[digest] else size
        return freed


def _sizes(code: CodeRecord) -> tuple[int, int | None]:
    """Return the bytes of a code, and of its residual."""
    return code.size, None if code.residual is None else code.residual.size


@dataclass(frozen=True)
class _Checked:
    """What was measured of a code that met the limits, and what the store records of it."""

    squared_error: float
    retained_gain: float | None = None
    evaluations: tuple[NewEvaluation, ...] = ()


class _CheckFailed(DataError):
    """A code misses a limit or cannot be measured; holds what was measured until then."""

    def __init__(self, reason: str, squared_error: float | None = None, retained_gain: float | None = None) -> None:
        super().__init__(reason)
        self.squared_error, self.retained_gain = squared_error, retained_gain


@dataclass(frozen=True)
class _EvictionCheck:
    """Measures codes, as they are on disk, against their originals. Any failure keeps the original."""

    store: Store
    models: Models
    max_error: float | None
    min_gain: float | None

    def run(self, task: TaskRecord, final: AdapterRecord, code: CodeRecord, generator: GeneratorRecord) -> _Checked:
        """Check a code, with its residual if it has one, and what is kept in addition to it."""
        if not final.is_evicted:
            check_references(self.store, final)
        error = self._squared_error(final, code, generator)
        if self.max_error is not None and (found := math.sqrt(error)) > self.max_error:
            raise _CheckFailed(f"its relative error is {found:.4f}, above the limit of {self.max_error:g}", error)
        if self.min_gain is None:
            return _Checked(error)
        if task.eval_data is None:
            raise _CheckFailed("it has no held-out text, so its retained gain is unknown", error)
        try:
            losses = losses_on_own_text(self.store, self.models, task, generator)
            # Measure everything again, also the original: this is the last time that it can be measured.
            results = losses.measure((code.rung,), again=True)
        except Cancelled:
            raise
        except FAILURES as failure:
            raise _CheckFailed(f"it cannot be measured: {as_error(failure).message}", error) from failure
        gain = results[code.rung].retained_gain if code.rung in results else None
        if gain is None:
            fact = "its original is no better than the base model on its held-out text, so there is no gain to keep"
            raise _CheckFailed(fact, error)
        if not gain >= self.min_gain:
            raise _CheckFailed(f"its retained gain is {gain:.4f}, below the limit of {self.min_gain:g}", error, gain)
        return _Checked(error, gain, tuple(map(losses.record_of, results.values())))

    def _squared_error(self, final: AdapterRecord, code: CodeRecord, generator: GeneratorRecord) -> float:
        generator_file = self.models.generator_file(generator)
        original = None if final.is_evicted else read_original(self.store, final)
        try:
            decoded = decode_code(self.store, generator_file, code, code.rung)
            # If only later checkpoints are left, what was measured when the final original went still holds.
            error = code.best_squared_error if original is None else squared_error(original, decoded)
        except DamagedStore:
            raise
        except Exception as failure:  # nothing that a decoder does may cost the original
            fact = f"its code cannot be decoded: {type(failure).__name__}: {failure}"
            raise _CheckFailed(fact) from failure
        if error is None or not math.isfinite(error):
            raise _CheckFailed("the relative error of its code is not a finite number")
        return error


@dataclass(frozen=True)
class Pinned:
    """What was pinned or unpinned."""

    names: list[str]
    evicted: list[str]


def set_pinned(context: Context, names: Sequence[str], *, pinned: bool) -> Pinned:
    """Pin some tasks, or unpin them."""
    with context.open() as store:
        done = store.tasks.pin(names, pinned)
        return Pinned(done, [name for name in done if store.tasks.final(name).is_evicted])
