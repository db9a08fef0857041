"""`icm encode`: make smaller, or more accurate, codes without training."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Annotated

from icm_cli.encode_report import sum_up, tell_encoded, tell_next
from icm_cli.options import (
    BaseModelOpt,
    DeviceOpt,
    MinGainOpt,
    ShardOpt,
    SomeTasksArg,
    WorkersOpt,
    keep_option,
    loss_option,
    option,
    quality_option,
    refine_option,
)
from icm_cli.session import Session, command, end
from icmlora.io.text import counted, parse_bytes
from icmlora.training.config import REFINE_STEPS

if TYPE_CHECKING:
    from icmlora.fleet.context import Context
    from icmlora.fleet.encode.encode import EncodeReport

ErrorOpt = Annotated[
    float | None,
    loss_option("--max-error", "Largest relative error that a code may have: ||dW' - dW|| / ||dW||, 0.3 for 30 %."),
]
ToleranceOpt = Annotated[
    float | None,
    loss_option(
        "--tolerance",
        "Largest squared error, weighted by how sensitive each channel is: the limit that `icm train --quality` sets. "
        "Most people want --max-error.",
    ),
]
SizeOpt = Annotated[
    str | None,
    option(
        "--size SIZE",
        "Most bytes that the code of a task may take, as 12KiB or 4MB: each code is as accurate as that allows.",
    ),
]
QualityOpt = Annotated[
    int | None,
    quality_option("Default: that of the current generator, if no other limit is given."),
]
KeepOpt = Annotated[
    float | None,
    keep_option(
        "Share of its adapter's effect that each code keeps, such as 0.98, in as few bytes as we find. Needs the base "
        "model."
    ),
]
RefineOpt = Annotated[
    int | None,
    refine_option(
        "Steps that fit each code to what its adapter does, on the task's samples or on texts that the adapted "
        f"model writes itself. Needs the base model. 0: none. Default: {REFINE_STEPS} with --quality or --keep, else "
        "none."
    ),
]
ResidualOpt = Annotated[
    bool, option("--residual", "Keep the codes, and also store a residual for tasks whose code misses the limit.")
]
AgainOpt = Annotated[bool, option("--again", "Re-encode even if the current code already meets these limits.")]


@command
def encode(
    session: Session,
    tasks: SomeTasksArg = None,
    quality: QualityOpt = None,
    keep: KeepOpt = None,
    max_error: ErrorOpt = None,
    min_gain: MinGainOpt = None,
    tolerance: ToleranceOpt = None,
    size: SizeOpt = None,
    refine: RefineOpt = None,
    residual: ResidualOpt = False,
    base_model: BaseModelOpt = None,
    device: DeviceOpt = None,
    again: AgainOpt = False,
    workers: WorkersOpt = None,
    shard: ShardOpt = None,
) -> None:
    """Re-encode tasks with the current generator, as small as the quality you ask for allows.

    Nothing is trained. Without limits, the quality of the generator counts, and codes are refined: each is fitted to
    what its adapter does, which makes it several times smaller. That takes the base model, and two or three minutes a
    task on a CPU. A quality is a share of the adapter's effect, or of its weights if the base model is missing. A code
    that keeps a little less says so and is no failure; with --keep it is one.

    A task for which no code is good enough gets its most accurate code and should keep its
    original: `icm evict` with the same --min-gain or --max-error does not delete it. Exit code 3 means that there are
    such tasks; `icm stats` counts them too. Original-only tasks affect the exit code only when named.

    A task whose current code was made with the same limits is skipped, so the same command continues after an
    interruption. --again re-encodes every task.

    --size makes the most accurate code that fits. With --max-error or --min-gain too, a task whose code then misses
    that limit is reported.

    With --residual the codes stay as they are, and a code together with its residual meets the limit. Bundles contain
    codes without residuals.

    Example:
      icm encode --keep 0.98
      icm encode --min-gain 0.98
    """
    from icmlora.fleet.encode.encode import encode

    def work(context: Context) -> EncodeReport:
        return encode(
            context,
            tasks or (),
            quality=quality,
            keep=keep,
            min_gain=min_gain,
            max_error=max_error,
            tolerance=tolerance,
            size=None if size is None else parse_bytes(size),
            refine=refine,
            residual=residual,
            base_model=base_model,
            device=session.device(device),
            again=again,
            workers=workers,
            shard=shard,
        )

    report, stopped = session.run("encode", work, partial(tell_encoded, session))
    sum_up(session, report)
    if not stopped:
        tell_next(session, report, max_error, min_gain)
    end(f"{counted(len(report.tasks), 'task')} encoded", stopped=stopped, partly=bool(report.short))
