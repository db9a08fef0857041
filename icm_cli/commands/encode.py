"""`icm encode`: re-encode tasks without training."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Annotated

from icm_cli.command import plain_command as command
from icm_cli.encode_report import print_encoded, print_evict_hint, sum_up
from icm_cli.options import (
    BaseModelOpt,
    DeviceOpt,
    ShardOpt,
    SomeTasksArg,
    WorkersOpt,
    keep_option,
    max_error_option,
    option,
    quality_option,
    refine_option,
)
from icm_cli.session import Session, end
from icmlora.io.text import counted, parse_bytes
from icmlora.training.config import REFINE_STEPS

if TYPE_CHECKING:
    from icmlora.fleet.context import Context
    from icmlora.fleet.encode.encode import EncodeReport

ErrorOpt = Annotated[
    float | None,
    max_error_option("Maximum relative error of a code, ||dW' - dW|| / ||dW||. 0.3 means 30 %."),
]
SizeOpt = Annotated[
    str | None,
    option(
        "--size SIZE",
        "Maximum size of a code, such as 12KiB or 4MB. Each code is as accurate as this allows.",
    ),
]
QualityOpt = Annotated[
    int | None,
    quality_option("Default: the quality of the current generator, unless another limit is given."),
]
KeepOpt = Annotated[
    float | None,
    keep_option(
        "Share of the adapter's effect that each code preserves, such as 0.98. Searches for the smallest such code. "
        "Needs the base model."
    ),
]
RefineOpt = Annotated[
    int | None,
    refine_option(
        "Steps that fit each code to the effect of its adapter, on the task's samples or on texts generated with the "
        f"adapter. Needs the base model. 0: none. Default: {REFINE_STEPS}, but none with --max-error or --size."
    ),
]
AgainOpt = Annotated[bool, option("--again", "Re-encode tasks already encoded with these limits.")]


@command
def encode(
    session: Session,
    tasks: SomeTasksArg = None,
    quality: QualityOpt = None,
    keep: KeepOpt = None,
    max_error: ErrorOpt = None,
    size: SizeOpt = None,
    refine: RefineOpt = None,
    base_model: BaseModelOpt = None,
    device: DeviceOpt = None,
    again: AgainOpt = False,
    workers: WorkersOpt = None,
    shard: ShardOpt = None,
) -> None:
    """Re-encode tasks with the current generator, without training.

    By default, codes have the quality of the generator and are refined: each is fitted to the effect of its adapter,
    which makes it several times smaller. Refinement needs the base model and takes two or three minutes per task on a
    CPU. A quality level sets the share of the adapter's effect to preserve, or a limit on the weight error if the base
    model is missing. A code slightly below the level is reported but is not a failure. With --keep it is.

    If no code of a task meets the limits, the most accurate one is stored and the exit code is 3. Original-only tasks
    affect the exit code only when named.

    Tasks already encoded with the same limits are skipped, so run the same command again to continue after an
    interruption.

    With --size, add --max-error to report codes that miss that limit.

    Example:
      icm encode --keep 0.98
      icm encode --size 12KiB
    """
    from icmlora.fleet.encode.encode import encode

    def work(context: Context) -> EncodeReport:
        return encode(
            context,
            tasks or (),
            quality=quality,
            keep=keep,
            max_error=max_error,
            size=None if size is None else parse_bytes(size),
            refine=refine,
            base_model=base_model,
            device=session.device(device),
            again=again,
            workers=workers,
            shard=shard,
        )

    report, stopped = session.run("encode", work, partial(print_encoded, session))
    sum_up(session, report)
    if not stopped:
        print_evict_hint(session, report, max_error)
    end(f"encoded {counted(len(report.tasks), 'task')}", stopped=stopped, partly=bool(report.short))
