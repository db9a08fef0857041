"""Delete originals whose code was checked to stand in for them, task by task.

    pinned? ──▶ code (and residual)? ──▶ read back, decoded, measured ──▶ evicted (rows, then files)
       └────────────────┴────────────────────┴──▶ kept, with the reason

What is evicted is acknowledged at once. A kill at any time loses nothing that was not checked, and the same command
again goes on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING

from icm_cli.workflows.chosen import chosen_tasks
from icm_cli.workflows.events import Event, Step, StopFlag
from icm_cli.workflows.evict_plan import EvictReport, EvictRequest, EvictStatus, TaskEvicted
from icm_cli.workflows.measured import latest_of
from icm_cli.workflows.opening import Place
from icm_cli.workflows.standing_in import CannotStandIn, Measured, StandInCheck
from icmlora.errors import IcmLoraError
from registry.errors import DamagedStore, LastCopy, TaskNotFound
from registry.evicted import Eviction
from registry.records import AdapterRecord, CodeRecord, GeneratorRecord, TaskRecord

if TYPE_CHECKING:
    from registry.store import Store


def evict(place: Place, request: EvictRequest, stop: StopFlag) -> Generator[Event, None, EvictReport]:
    """Evict the originals of some tasks, or say what would be evicted.

    Raises:
        TaskNotFound: A name is not in the store; nothing was deleted.
        DeviceUnavailable: The device is not there; nothing was deleted.
        StoreLocked: Other processes use the store.
    """
    report = EvictReport()
    # To measure a gain may be to learn what the base model is, which the store then notes.
    with place.open(read_only=request.dry_run and request.min_gain is None) as store:
        tasks = chosen_tasks(store, request.names)
        work = _Work(store, request)
        report.left = store.finish_evictions(dry_run=request.dry_run)
        yield Step(0, len(tasks))
        for task in tasks:
            if stop.requested:
                report.stopped = True
                break
            done = work.one(task)
            report.tasks.append(done)
            report.partly |= done.status == "kept" or (done.status == "pinned" and bool(request.names))
            yield done
            yield Step(len(report.tasks), len(tasks), task.name)
    return report


class _Work:
    """One eviction of many tasks."""

    def __init__(self, store: Store, request: EvictRequest) -> None:
        self._store, self._request = store, request
        self._check = StandInCheck(store, max_error=request.max_error, min_gain=request.min_gain, device=request.device)
        self._in_use = Counter(store.weights_in_use())

    def one(self, task: TaskRecord) -> TaskEvicted:
        """Check one task and evict it, or say why not."""
        try:
            return self._one(task)
        except TaskNotFound:  # to evict another one, the store was let go of for a moment: `icm rm` had its turn
            return TaskEvicted(task.name, "removed")

    def _one(self, task: TaskRecord) -> TaskEvicted:
        adapters = self._store.adapters(task.name)
        chosen = [row for row in adapters if not (row.is_evicted or (row.is_final and self._request.checkpoints_only))]
        generator = self._store.current_generator(task.base_model)
        code = None if generator is None else self._store.code(task.name, generator.id)
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
            freed = self._store.evict(order)
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
        found = latest_of(self._store.evaluations(task.name), task, code.rung, generator)
        gain = None if found is None else found.retained_gain
        return TaskEvicted(task.name, status, 0, 0, *_sizes(code), code.best_error, gain)


def _sizes(code: CodeRecord) -> tuple[int, int | None]:
    """Return the bytes of a code, and of what lies beside it."""
    return code.size, None if code.residual is None else code.residual.size
