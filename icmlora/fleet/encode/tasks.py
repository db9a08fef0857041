"""Re-encode tasks, one base model after the other. Nothing is trained.

task ──search──▶ code ──compare and swap──▶ replaces the present code and its measurements
    encode_tasks        _record
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from typing import TYPE_CHECKING

from icmlora.errors import DataError
from icmlora.fleet.context import Context, Shard, reporting, select_tasks
from icmlora.fleet.encode.report import EncodeReport, TaskEncoded
from icmlora.fleet.encode.search import encode_tasks
from icmlora.fleet.failures import Failed
from icmlora.fleet.resources.task_code import is_same_code, replaced_bytes, with_code
from icmlora.fleet.resources.workers import worker_pool
from icmlora.generator.codec.limits import Limits
from registry.errors import TaskNotFound
from registry.filters import Selection
from registry.manifests import Code, Task

if TYPE_CHECKING:
    from registry.store import Store


def encode_in(
    context: Context,
    store: Store,
    tasks: Sequence[str],
    limits: Limits,
    base_model: str | None,
    device: str,
    workers: str | None,
    *,
    again: bool = False,
    shard: Shard | None = None,
) -> EncodeReport:
    """Do the work of `encode` in an open store."""
    report = EncodeReport(is_named=bool(tasks))
    with reporting(report):
        chosen = select_tasks(store, tasks, base_model, shard)
        if chosen and not any(store.generator(label) for label in {task.base_model for task in chosen}):
            raise DataError(f"there is no generator for task {chosen[0].name!r}", hint="run `icm train` to train one")
        on_progress = context.counting(report.done, len(chosen))
        with worker_pool(context, store, device=device, workers=workers) as pool:
            for label, of_base in groupby(chosen, key=lambda task: task.base_model):
                with store.job(label, shared=True):
                    results = pool.each(
                        encode_tasks, list(of_base), on_progress, limits, again=again, is_named=bool(tasks)
                    )
                    replaced = list[tuple[Code | None, Code]]()
                    try:
                        for task, result in results:
                            report.done.append(_record(store, task.name, result, replaced))
                            context.on_event(report.done[-1])
                            on_progress(task.name)
                    finally:
                        before, after = [old for old, _ in replaced], [new for _, new in replaced]
                        used = set[str]()
                        if {old.generator for old in before if old is not None} - {new.generator for new in after}:
                            used = {str(row.generator) for row in store.rows(Selection(base_model=label))}
                        report.replaced_bytes += replaced_bytes(before, after, used)
    return report


def _record(
    store: Store, name: str, result: TaskEncoded | Failed, replaced: list[tuple[Code | None, Code]]
) -> TaskEncoded:
    """Record the code of a task, and note the one that it replaces, unless another process changed the task."""
    if not isinstance(result, TaskEncoded):
        return TaskEncoded(name, "unmeasured", reason=result.error.message)
    if result.new is None:
        return result
    seen, code, data = result.new
    reason: str | None = None

    def change(task: Task) -> Task:
        nonlocal reason
        reason = None
        if not task.final.is_same(seen.final):
            reason = "its adapter changed during encoding"
        elif task.final.is_evicted:
            reason = "its original was evicted during encoding"
        elif not is_same_code(task.code, seen.code):
            reason = "its code was replaced during encoding"
        return with_code(task, code) if reason is None else task

    store.blobs.put(data)
    try:
        store.update(name, change)
    except TaskNotFound:  # `icm rm` does not wait for this job
        reason = "it was removed during encoding"
    if reason is not None:
        return TaskEncoded(name, "changed", reason=reason)
    replaced.append((seen.code, code))
    return replace(result, new=None)
