"""Re-encode tasks with the current generator: `icm encode`."""

from __future__ import annotations

from typing import Annotated

from icmlora.fleet.context import Context, Shard, use_case
from icmlora.fleet.encode.report import EncodeReport
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
