"""What an eviction is asked for and what it reports.

Whether a task's code may stand in for its original: read again from disk, decoded and measured, now.

    generator ─┐
    code ──────┤ digest
    residual ──┴ checked ──decode──▶ adapter ── dW error against the stored original
                                        └─ written ──PEFT──▶ retained gain on the task's held-out text

What a code is, and how it is decoded, is the codec's business; whatever goes wrong in there keeps the original.

Delete originals whose code was checked to stand in for them, task by task.

    pinned? ──▶ code (and residual)? ──▶ read back, decoded, measured ──▶ evicted (rows, then files)
       └────────────────┴────────────────────┴──▶ kept, with the reason

What is evicted is acknowledged at once. A kill at any time loses nothing that was not checked, and the same command
again goes on.

Keep the originals of some tasks for good, or let them go again.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from icmlora.adapter.metrics import relative_dw_error
from icmlora.errors import DataError, IcmLoraError
from icmlora.fleet.context import Context, Event, Progress, StopFlag, chosen_tasks
from icmlora.fleet.decoding import decode_code
from icmlora.fleet.loading import Models, read_original
from icmlora.fleet.measure import on_own_text
from icmlora.io.devices import resolve_device
from registry.errors import DamagedStore, LastCopy, TaskNotFound
from registry.evaluations import latest
from registry.records import AdapterRecord, CodeRecord, Eviction, GeneratorRecord, NewEvaluation, TaskRecord

if TYPE_CHECKING:
    from registry.store import Store

EvictStatus = Literal["evicted", "would_evict", "kept", "pinned", "known", "removed"]


@dataclass(frozen=True)
class EvictRequest:
    """What `icm evict` was asked for; at least one limit is given.

    Attributes:
        names: Tasks; all if empty.
        max_error: Largest relative dW error that a code may have.
        min_gain: Smallest retained gain that a code may have; measuring it needs the base model.
        checkpoints_only: Leave the final adapters.
        dry_run: Check everything and delete nothing.
        device: Where the retained gain is measured.
    """

    names: Sequence[str]
    max_error: float | None
    min_gain: float | None
    checkpoints_only: bool
    dry_run: bool
    device: str


@dataclass(frozen=True)
class TaskEvicted(Event):
    """What became of one task.

    Attributes:
        task: Its name.
        status: `evicted`; `would_evict` in a dry run; `kept` (see `reason`); `pinned`; `known` (nothing was left to
            evict); `removed` (by another process, since the command began).
        adapters: Originals that went, checkpoints included.
        freed: Their bytes on disk; a file that another task needs frees nothing.
        code_size: The code that stands in.
        residual_size: The residual that stands in with it, if there is one.
        dw_error: Their relative dW error, as measured now, else as known.
        retained_gain: Their retained gain, likewise.
        reason: Why the original is kept.
    """

    task: str
    status: EvictStatus
    adapters: int = 0
    freed: int = 0
    code_size: int | None = None
    residual_size: int | None = None
    dw_error: float | None = None
    retained_gain: float | None = None
    reason: str | None = None


@dataclass
class EvictReport:
    """What an eviction did, or would do.

    Attributes:
        tasks: One entry per task.
        left: Bytes of files that a killed eviction had left.
        partly: Whether a task was kept that was meant to go: one below the limit, or a pinned one that was named.
        stopped: Whether the user stopped it before the end.
    """

    tasks: list[TaskEvicted] = field(default_factory=list)
    left: int = 0
    partly: bool = False
    stopped: bool = False

    @property
    def gone(self) -> list[TaskEvicted]:
        """The tasks whose originals went, or would go."""
        return [task for task in self.tasks if task.status in ("evicted", "would_evict")]

    @property
    def kept(self) -> list[TaskEvicted]:
        """The tasks that do not meet the limits."""
        return [task for task in self.tasks if task.status == "kept"]

    @property
    def freed(self) -> int:
        """All bytes that went, or would go."""
        return self.left + sum(task.freed for task in self.tasks)


@dataclass(frozen=True)
class Measured:
    """What was measured of a code, and what of it is to be recorded."""

    dw_error: float
    retained_gain: float | None
    evaluations: tuple[NewEvaluation, ...]


class CannotStandIn(DataError):
    """A code that does not keep what was asked for, or of which that is not known.

    Attributes:
        dw_error: What was measured of it before it failed.
        retained_gain: Likewise.
    """

    def __init__(self, reason: str, dw_error: float | None = None, retained_gain: float | None = None) -> None:
        super().__init__(reason)
        self.dw_error, self.retained_gain = dw_error, retained_gain


class StandInCheck:
    """Measures one task after the other; the latest generator and base model are kept, adapters are not.

    Args:
        store: The open store.
        max_error: Largest relative dW error, or None for any.
        min_gain: Smallest retained gain, or None for any; it is then not measured.
        device: Where to measure the gain.
    """

    def __init__(
        self, store: Store, *, max_error: float | None, min_gain: float | None, device: str, cache: Path
    ) -> None:
        self._store, self._max_error, self._min_gain = store, max_error, min_gain
        self._models = Models(store, resolve_device(device), cache)

    def measure(self, task: TaskRecord, final: AdapterRecord, code: CodeRecord, generator: GeneratorRecord) -> Measured:
        """Measure a code, with its residual if it has one, against the original, which is in the store.

        Raises:
            CannotStandIn: It does not keep the limits, or cannot be decoded.
            DamagedStore: Generator, code, residual, original or text are not the bytes that were stored.
            IcmLoraError: Generator, base model or text cannot be used.
        """
        error = self._dw_error(final, code, generator)
        if self._max_error is not None and error > self._max_error:
            raise CannotStandIn(f"its relative dW error is {error:.4f}; {self._max_error:g} is allowed", error)
        if self._min_gain is None:
            return Measured(error, None, ())
        return self._with_gain(task, code, generator, error, self._min_gain)

    def _dw_error(self, final: AdapterRecord, code: CodeRecord, generator: GeneratorRecord) -> float:
        generator_file = self._models.generator_file(generator)
        original = None if final.is_evicted else read_original(self._store, final)
        try:
            decoded = decode_code(self._store, generator_file, code, code.rung)
            # Without the original (only later checkpoints are left) what was measured when it went stands.
            error = code.best_error if original is None else relative_dw_error(original, decoded)
        except DamagedStore:
            raise
        except Exception as failure:  # the last look at the original: nothing that a decoder does may cost it
            fact = f"its code cannot be decoded: {type(failure).__name__}: {failure}"
            raise CannotStandIn(fact) from failure
        if error is None or not math.isfinite(error):
            raise CannotStandIn("the relative dW error of its code is no number")
        return error

    def _with_gain(
        self, task: TaskRecord, code: CodeRecord, generator: GeneratorRecord, error: float, limit: float
    ) -> Measured:
        if task.eval_data is None:
            raise CannotStandIn("it has no held-out text, so its retained gain is not known", error)
        work = on_own_text(self._store, self._models.base(task.base_model), task, generator)
        # Everything anew, the original too: it is the last time that it can be measured.
        results = work.run((code.rung,), again=True, record=False)
        gain = results[code.rung].retained_gain if code.rung in results else None
        if gain is None:
            raise CannotStandIn("its original does not help on its held-out text, so there is no gain to keep", error)
        if not gain >= limit:
            raise CannotStandIn(f"its retained gain is {gain:.4f}; {limit:g} is asked for", error, gain)
        return Measured(error, gain, tuple(map(work.evaluation_of, results.values())))


def evict(context: Context, request: EvictRequest, stop: StopFlag) -> Generator[Event, None, EvictReport]:
    """Evict the originals of some tasks, or say what would be evicted.

    Raises:
        TaskNotFound: A name is not in the store; nothing was deleted.
        DeviceUnavailable: The device is not there; nothing was deleted.
        StoreLocked: Other processes use the store.
    """
    report = EvictReport()
    # To measure a gain may be to learn what the base model is, which the store then notes.
    with context.open(read_only=request.dry_run and request.min_gain is None) as store:
        tasks = chosen_tasks(store, request.names)
        work = _Work(store, request, context.cache)
        report.left = store.originals.finish_evictions(dry_run=request.dry_run)
        yield Progress(0, len(tasks))
        for task in tasks:
            if stop.requested:
                report.stopped = True
                break
            done = work.one(task)
            report.tasks.append(done)
            report.partly |= done.status == "kept" or (done.status == "pinned" and bool(request.names))
            yield done
            yield Progress(len(report.tasks), len(tasks), task.name)
    return report


class _Work:
    """One eviction of many tasks."""

    def __init__(self, store: Store, request: EvictRequest, cache: Path) -> None:
        self._store, self._request = store, request
        self._check = StandInCheck(
            store, max_error=request.max_error, min_gain=request.min_gain, device=request.device, cache=cache
        )
        self._in_use = Counter(store.originals.in_use())

    def one(self, task: TaskRecord) -> TaskEvicted:
        """Check one task and evict it, or say why not."""
        try:
            return self._one(task)
        except TaskNotFound:  # to evict another one, the store was let go of for a moment: `icm rm` had its turn
            return TaskEvicted(task.name, "removed")

    def _one(self, task: TaskRecord) -> TaskEvicted:
        adapters = self._store.tasks.adapters(task.name)
        chosen = [row for row in adapters if not (row.is_evicted or (row.is_final and self._request.checkpoints_only))]
        generator = self._store.generators.current(task.base_model)
        code = None if generator is None else self._store.codes.get(task.name, generator.id)
        if task.pinned or not chosen:
            return self._as_known(task, code, generator)
        if code is None or generator is None:
            return TaskEvicted(task.name, "kept", reason="it has no code: `icm train --update` makes it")
        try:
            measured = self._check.measure(task, adapters[-1], code, generator)
            return self._let_go(task, chosen, code, generator, measured)
        except CannotStandIn as error:
            figures = (*_sizes(code), error.dw_error, error.retained_gain)
            return TaskEvicted(task.name, "kept", 0, 0, *figures, str(error))
        except (IcmLoraError, DamagedStore, LastCopy) as error:
            return TaskEvicted(task.name, "kept", 0, 0, *_sizes(code), reason=str(error))

    def _let_go(
        self,
        task: TaskRecord,
        chosen: Sequence[AdapterRecord],
        code: CodeRecord,
        generator: GeneratorRecord,
        measured: Measured,
    ) -> TaskEvicted:
        freed = self._freed(chosen)
        if not self._request.dry_run:
            numbers = [row.id for row in chosen]
            order = Eviction(task.name, numbers, code, generator, measured.dw_error, measured.evaluations)
            freed = self._store.originals.evict(order)
        status: EvictStatus = "would_evict" if self._request.dry_run else "evicted"
        figures = (*_sizes(code), measured.dw_error, measured.retained_gain)
        return TaskEvicted(task.name, status, len(chosen), freed, *figures)

    def _freed(self, chosen: Sequence[AdapterRecord]) -> int:
        """Return the bytes of the files that go with some adapters; several may share one."""
        freed = 0
        for row in chosen:
            self._in_use[row.weights] -= 1
            freed += 0 if self._in_use[row.weights] else row.weights_bytes
        return freed

    def _as_known(self, task: TaskRecord, code: CodeRecord | None, generator: GeneratorRecord | None) -> TaskEvicted:
        status: EvictStatus = "pinned" if task.pinned else "known"
        if code is None or generator is None:
            return TaskEvicted(task.name, status)
        found = latest(self._store.evaluations.all(task.name), task, code.rung, generator)
        gain = None if found is None else found.retained_gain
        return TaskEvicted(task.name, status, 0, 0, *_sizes(code), code.best_error, gain)


def _sizes(code: CodeRecord) -> tuple[int, int | None]:
    """Return the bytes of a code, and of what lies beside it."""
    return code.size, None if code.residual is None else code.residual.size


@dataclass(frozen=True)
class Pinned:
    """What was pinned or unpinned.

    Attributes:
        names: The tasks, as the store spells them.
        evicted: Those whose original is gone already.
    """

    names: list[str]
    evicted: list[str]


def set_pinned(context: Context, names: Sequence[str], *, pinned: bool) -> Pinned:
    """Pin some tasks, or unpin them.

    Raises:
        TaskNotFound: One of them is not in the store; nothing was changed.
    """
    with context.open() as store:
        done = store.tasks.pin(names, pinned)
        return Pinned(done, [name for name in done if store.tasks.final(name).is_evicted])
