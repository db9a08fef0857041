"""Re-encode tasks with the current generator: `icm encode`. Nothing is trained.

task ──search──▶ code ──compare and swap──▶ replaces the present code and its measurements
    encode_tasks        _record
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

from icmlora.errors import DataError
from icmlora.fleet.context import Context, Event, Shard, reporting, select_tasks, use_case
from icmlora.fleet.params import (
    BaseModelName,
    Device,
    Keep,
    MaxError,
    Param,
    Quality,
    Refine,
    ShardOf,
    Size,
    Tasks,
    Workers,
)
from icmlora.fleet.resources.task_code import is_same_code, replaced_bytes, with_code
from icmlora.fleet.results import Report
from registry.errors import TaskNotFound
from registry.filters import Selection
from registry.manifests import Code, Task, WithRelativeError

if TYPE_CHECKING:
    from icmlora.fleet.failures import Failed
    from icmlora.generator.codec.limits import Limits
    from registry.store import Store

EncodeStatus = Literal["encoded", "below", "known", "evicted", "unmeasured", "changed", "original_only"]


class NewCode(NamedTuple):
    """A code that is not recorded yet."""

    seen: Task  # as it was encoded
    code: Code
    data: bytes


@dataclass(frozen=True)
class TaskEncoded(WithRelativeError, Event):
    """One task is done."""

    task: str
    # `encoded`: it has a new code, the smallest found that meets the limits. `known`: it had one already. `below`: no
    # code meets them, so it should keep its original; it has the most accurate code found, or with a `reason` its
    # earlier one. `evicted`: its original was evicted, so its code stays. `unmeasured`: see `reason`; its code stays.
    # `original_only`: it cannot have a code, see `reason`. `changed`: another process changed it, see `reason`.
    status: EncodeStatus
    size: int | None = None  # bytes of its code
    before: int | None = None  # bytes of its earlier code, if any
    squared_error: float | None = None
    effect: float | None = None  # share of its adapter's effect that its code keeps
    reason: str | None = None
    new: NewCode | None = field(default=None, repr=False)  # None in events and reports


@dataclass
class EncodeReport(Report[TaskEncoded]):
    """The results of `encode`; `done` has every task."""

    is_named: bool = False  # whether the tasks were named
    replaced_bytes: int = 0  # of codes and networks that no code needs any more

    @property
    def short(self) -> list[TaskEncoded]:
        """The tasks without a code that is known to meet the limits; unnamed ones only if they can have a code."""
        missed = ("below", "unmeasured", "changed", *(["original_only", "evicted"] if self.is_named else []))
        return [task for task in self.done if task.status in missed]

    @property
    def is_partial(self) -> bool:
        """Whether a task has no code that meets the limits."""
        return self.stopped or bool(self.short)


@use_case
def encode(
    context: Context,
    tasks: Tasks = (),
    *,
    quality: Quality = None,
    keep: Keep = None,
    max_error: MaxError = None,
    size: Size = None,
    refine: Refine = None,
    base_model: BaseModelName = None,
    device: Device = "auto",
    again: Annotated[bool, Param("Re-encode tasks already encoded with these limits.")] = False,
    workers: Workers = None,
    shard: ShardOf = None,
) -> EncodeReport:
    """Re-encode tasks with the current generator, without training.

    By default, codes have the quality of the generator and are refined: each is fitted to the effect of its adapter,
    which makes it several times smaller. Refinement needs the base model and takes two or three minutes per task on a
    CPU. A quality level sets the share of the adapter's effect to preserve, or a limit on the weight error if the base
    model is missing. A code slightly below the level is reported but is not a failure. With --keep it is.

    If no code of a task meets the limits, the exit code is 3. The closest code found is stored, but with --max-error
    alone the task keeps its earlier code. Original-only tasks affect the exit code only when named.

    Tasks already encoded with the same limits are skipped, so run the same command again to continue after an
    interruption.

    With --size, add --max-error to report codes that miss that limit.

    Example:
      icm encode --keep 0.98
      icm encode --size 12KiB

    Returns:
        One entry per task; `report.short` lists those without a code that meets the limits.

    Raises:
        OptionsConflict: Limits that do not go together.
        DataError: There is no generator, or the base model has no tasks.
    """
    from icmlora.fleet.resources.workers import check_place
    from icmlora.generator.codec.limits import Limits

    limits = Limits(quality=quality, keep=keep, max_error=max_error, size=size, refine=refine)
    check_place(device, workers)
    where = Shard.of(shard)
    with context.open() as store:
        return encode_in(context, store, tasks, limits, base_model, device, workers, again=again, shard=where)


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
    from icmlora.fleet.encode.search import encode_tasks
    from icmlora.fleet.resources.workers import worker_pool

    report = EncodeReport(is_named=bool(tasks))
    with reporting(report):
        chosen = select_tasks(store, tasks, base_model, shard)
        if chosen and not any(store.generator(label) for label in {task.base_model for task in chosen}):
            raise DataError(f"there is no generator for task {chosen[0].name!r}", hint="run `icm train` to train one")
        tell = context.counting(report.done, len(chosen))
        with worker_pool(context, store, device=device, workers=workers) as pool:
            for label, of_base in groupby(chosen, key=lambda task: task.base_model):
                with store.job(label, shared=True):
                    results = pool.each(encode_tasks, list(of_base), tell, limits, again=again, is_named=bool(tasks))
                    replaced = list[tuple[Code | None, Code]]()
                    try:
                        for task, result in results:
                            report.done.append(_record(store, task.name, result, replaced))
                            context.on_event(report.done[-1])
                            tell(task.name)
                    finally:
                        report.replaced_bytes += _replaced_bytes(store, label, replaced)
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


def _replaced_bytes(store: Store, base_model: str, codes: Sequence[tuple[Code | None, Code]]) -> int:
    """Return the bytes that are not needed after codes were replaced by others."""
    before, after = [old for old, _ in codes], [new for _, new in codes]
    used = set[str]()
    if {old.generator for old in before if old is not None} - {new.generator for new in after}:
        used = {str(row.generator) for row in store.rows(Selection(base_model=base_model))}
    return replaced_bytes(before, after, used)
