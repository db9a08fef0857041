"""Re-encode tasks with the current generator: `icm encode`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal, NamedTuple

from icmlora.fleet.context import Context, Event, Shard, use_case
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
from icmlora.fleet.results import Report
from registry.manifests import Code, Task, WithRelativeError

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
    from icmlora.fleet.encode.tasks import encode_in  # imports torch, as the next two do
    from icmlora.fleet.resources.workers import check_place
    from icmlora.generator.codec.limits import Limits

    limits = Limits(quality=quality, keep=keep, max_error=max_error, size=size, refine=refine)
    check_place(device, workers)
    where = Shard.of(shard)
    with context.open() as store:
        return encode_in(context, store, tasks, limits, base_model, device, workers, again=again, shard=where)
