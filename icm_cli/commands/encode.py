"""`icm encode`: make smaller, or more accurate, codes without training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from icm_cli.errors import ExitCode, Interrupted, UsageProblem
from icm_cli.options import (
    BaseModelOpt,
    DeviceOpt,
    ShardOpt,
    SomeTasksArg,
    WorkersOpt,
    gain_option,
    loss_option,
    quality_option,
    refine_option,
)
from icm_cli.output import Column
from icm_cli.session import Session, command
from icm_cli.text import as_fields, coded_size
from icmlora.fleet.measure.precision import gain_text
from icmlora.io.text import counted, human_size, parse_bytes, some

if TYPE_CHECKING:
    from collections.abc import Callable

    from icmlora.fleet.api import Fleet
    from icmlora.fleet.context import Event
    from icmlora.fleet.encode.encode import EncodeReport, TaskEncoded

ErrorOpt = Annotated[
    float | None,
    loss_option("--max-error", "Largest relative error that a code may have: ||dW' - dW|| / ||dW||, 0.3 for 30 %."),
]
GainOpt = Annotated[
    float | None,
    gain_option("Smallest retained gain that a code may have, on the task's held-out text. Needs the base model."),
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
    typer.Option(
        "--size",
        metavar="SIZE",
        help="Most bytes that the code of a task may take, as 12KiB or 4MB: each code is as accurate as that allows.",
        show_default=False,
    ),
]
QualityOpt = Annotated[
    int | None,
    quality_option("Default: that of the current generator, if no other limit is given."),
]
RefineOpt = Annotated[
    int | None,
    refine_option(
        "Steps that fit each code to what its adapter does, on the task's samples or on texts that the adapted "
        "model writes itself. Needs the base model. 0: none. Default: 40 with a quality, else none."
    ),
]
ResidualOpt = Annotated[
    bool,
    typer.Option("--residual", help="Keep the codes, and also store a residual for tasks whose code misses the limit."),
]
AgainOpt = Annotated[
    bool, typer.Option("--again", help="Re-encode even if the current code already meets these limits.")
]

_COLUMNS = (
    Column("task", shrink=True),
    Column("result"),
    Column("code", right=True),
    Column("before", right=True),
    Column("relative error", right=True),
    Column("retained gain", right=True),
)
_STATUS = {
    "known": "up to date",
    "enough": "code is enough",
    "below": "misses the limit",
    "evicted": "original evicted",
    "unmeasured": "not measured",
    "original_only": "original only",
    "changed": "changed meanwhile",
}


@command
def encode(
    session: Session,
    tasks: SomeTasksArg = None,
    quality: QualityOpt = None,
    max_error: ErrorOpt = None,
    min_gain: GainOpt = None,
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
    what its adapter does, which makes it several times smaller. That takes the base model, and a minute or two a task
    on a CPU. A task for which no code is good enough gets its most accurate code and should keep its
    original: `icm evict` with the same --min-gain or --max-error does not delete it. Exit code 3 means that there are
    such tasks; `icm stats` counts them too. Tasks of which only the original is kept count only if you name them.

    A task whose current code was made with the same limits is skipped, so the same command continues after an
    interruption. --again re-encodes every task.

    With --size the codes are as accurate as so many bytes each allow. With --max-error or --min-gain too, a task whose
    code then misses that limit is reported.

    With --residual the codes stay as they are, and a code together with its residual meets the limit. Bundles contain
    codes without residuals.

    Example:
      icm encode --min-gain 0.98
    """
    limited = any(limit is not None for limit in (max_error, min_gain, tolerance, size))
    _check_usage(quality, size, max_error, refine, limited=limited, residual=residual)

    def work(fleet: Fleet) -> EncodeReport:
        return fleet.encode(
            tasks or [],
            quality=quality,
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

    if run(session, work, evict_hint(max_error, min_gain)):
        raise typer.Exit(ExitCode.PARTLY)


def _check_usage(
    quality: int | None, size: str | None, max_error: float | None, refine: int | None, *, limited: bool, residual: bool
) -> None:
    if quality is not None and limited:
        raise UsageProblem("--quality sets the limit itself: leave out --max-error, --min-gain, --tolerance and --size")
    if size is not None and (refine or residual):
        other = "--refine changes how many bytes a code takes" if refine else "--residual is for an error"
        raise UsageProblem(f"{other}, so it cannot be used with --size", hint="leave out one of the two")
    if refine and max_error is not None:
        hint = "use --min-gain, which measures what refined codes do"
        raise UsageProblem("--refine moves codes away from the weights, so it cannot keep --max-error", hint=hint)
    if refine and residual:
        hint = "refine the codes first, then add residuals"
        raise UsageProblem("--residual keeps the codes as they are, so it cannot be used with --refine", hint=hint)


def run(
    session: Session,
    work: Callable[[Fleet], EncodeReport],
    hint: str | None = None,
    *,
    go_on: str = "run the same command to continue",
    brief: bool = False,
) -> bool:
    """Encode, print what was done with each task or in all, and say whether a task missed the limits."""
    report, stopped = session.run("encode", work, lambda event: _tell(session, event, "refined" if brief else "task"))
    _sum_up(session, report, brief=brief)
    if stopped:
        done = counted(len(report.tasks), "task")
        raise Interrupted(f"interrupted; {done} encoded", hint=go_on)
    if hint and not report.short and any(task.status != "evicted" for task in report.tasks):
        session.out.hint(hint)
    return bool(report.short)


def evict_hint(max_error: float | None, min_gain: float | None) -> str:
    """Return the command that deletes originals under the same limits."""
    limits = (("--max-error", max_error), ("--min-gain", min_gain))
    same = " ".join(f"{option} {limit:g}" for option, limit in limits if limit is not None)
    return f"`icm evict {same or '--min-gain GAIN'}` deletes the originals of tasks whose codes meet the limit"


def _tell(session: Session, event: Event, kind: str) -> None:
    from icmlora.fleet.encode.encode import TaskEncoded

    if isinstance(event, TaskEncoded):
        session.out.event(kind, **as_fields(event))


def _sum_up(session: Session, report: EncodeReport, *, brief: bool) -> None:
    out = session.out
    now = sum((task.size or 0) + (task.residual_size or 0) for task in report.tasks)
    before = sum(task.before or 0 for task in report.tasks)
    if not brief:
        out.event("summary", tasks=len(report.tasks), short=len(report.short), size=now, before=before)
        out.table(_COLUMNS, [_cells(task) for task in sorted(report.tasks, key=lambda task: task.task)])
    for reason, names in _reasons(report).items():
        out.line(f"{some(names)}: {reason}")
    done = sum(task.status == "encoded" for task in report.tasks) if brief else len(report.tasks)
    if done or not brief:
        what = f"refined {counted(done, 'code')}" if brief else counted(done, "task")
        missed = "" if brief else f"; {len(report.short)} without a code that meets the limit"
        out.line(f"{what}, {human_size(now)} in total, {human_size(before)} before{missed}")


def _reasons(report: EncodeReport) -> dict[str, list[str]]:
    """Return the tasks of each reason."""
    found: dict[str, list[str]] = {}
    for task in report.tasks:
        if task.reason:
            found.setdefault(task.reason, []).append(task.task)
    return found


def _cells(task: TaskEncoded) -> list[str]:
    return [
        task.task,
        _STATUS.get(task.status, task.status),
        coded_size(task.size, task.residual_size),
        "-" if task.before is None else human_size(task.before),
        "-" if task.relative_error is None else f"{task.relative_error:.4f}",
        gain_text(task.retained_gain, task.precision, digits=4),
    ]
