"""`icm evict`: delete originals whose codes were checked."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated

import typer

from icm_cli.errors import ExitCode, Interrupted, UsageProblem
from icm_cli.options import DeviceOpt, DryRunOpt, SomeTasksArg, WorkersOpt, gain_option
from icm_cli.output import Column
from icm_cli.session import Session, command
from icm_cli.text import as_fields, coded_size
from icmlora.io.text import counted, human_size

if TYPE_CHECKING:
    from icmlora.fleet.context import Event
    from icmlora.fleet.evict import EvictReport, TaskEvicted

ErrorOpt = Annotated[
    float | None,
    typer.Option(
        "--max-error",
        metavar="X",
        min=0.0,
        help="Largest relative error that a code may have: ||dW' - dW|| / ||dW||, 0.3 for 30 %.",
        show_default=False,
    ),
]
GainOpt = Annotated[
    float | None,
    gain_option("Smallest retained gain that a code may have, on the task's held-out text. Needs the base model."),
]
CheckpointsOpt = Annotated[
    bool, typer.Option("--checkpoints-only", help="Delete only checkpoints; keep the final adapters.")
]

_COLUMNS = (
    Column("task", shrink=True),
    Column("result"),
    Column("freed", right=True),
    Column("code", right=True),
    Column("relative error", right=True),
    Column("retained gain", right=True),
)
_STATUS = {"would_evict": "would evict", "known": "nothing to do", "original_only": "original only"}


@command
def evict(
    session: Session,
    tasks: SomeTasksArg = None,
    max_error: ErrorOpt = None,
    min_gain: GainOpt = None,
    checkpoints_only: CheckpointsOpt = False,
    device: DeviceOpt = None,
    dry_run: DryRunOpt = False,
    workers: WorkersOpt = None,
) -> None:
    """Delete originals (final adapters and checkpoints), each after a check that its code can replace it.

    For the check, each code is read back from disk, with its residual if it has one, decoded, and measured against the
    original. A task whose code misses a limit keeps its original; so does a pinned task. Exit code 3 means that some
    originals were kept; tasks of which only the original is kept count only if you name them. Works on a full disk.

    Example:
      icm evict --max-error 0.22 --dry-run
    """
    _check_limits(max_error, min_gain)
    report, stopped = session.run(
        "evict",
        lambda fleet: fleet.evict(
            tasks or [],
            max_error=max_error,
            min_gain=min_gain,
            checkpoints_only=checkpoints_only,
            dry_run=dry_run,
            device=session.device(device),
            workers=workers,
        ),
        lambda event: _tell(session, event),
    )
    _sum_up(session, report, dry_run=dry_run)
    if stopped:
        done = counted(len(report.tasks), "task")
        raise Interrupted(f"interrupted; {done} checked", hint="run the same command to continue")
    if report.partly:
        raise typer.Exit(ExitCode.PARTLY)


def _check_limits(max_error: float | None, min_gain: float | None) -> None:
    if max_error is None and min_gain is None:
        hint = "`--max-error 0.22` limits the relative error, `--min-gain 0.97` the retained gain"
        raise UsageProblem("no limit was given: use --max-error, --min-gain or both", hint=hint)
    if any(limit is not None and not math.isfinite(limit) for limit in (max_error, min_gain)):
        raise UsageProblem("a limit must be a finite number")


def _tell(session: Session, event: Event) -> None:
    from icmlora.fleet.evict import TaskEvicted

    if isinstance(event, TaskEvicted):
        session.out.event("task", **as_fields(event))


def _sum_up(session: Session, report: EvictReport, *, dry_run: bool) -> None:
    out = session.out
    out.event(
        "summary",
        dry_run=dry_run,
        tasks=len(report.tasks),
        evicted=len(report.gone),
        kept=len(report.kept),
        freed=report.freed,
    )
    if out.is_quiet:
        for task in report.gone:
            out.answer(task.task)
    out.table(_COLUMNS, [_cells(task) for task in sorted(report.tasks, key=lambda task: task.task)])
    for task in report.kept:
        out.line(f"kept {task.task}: {task.reason}")
    for task in report.original_only:
        out.line(f"original only, {task.task}: {task.reason}")
    if report.left:
        out.note(f"{human_size(report.left)} of this had been left by an interrupted `icm evict`")
    verb, freed = ("would evict", "would free") if dry_run else ("evicted", "freed")
    out.line(f"{verb} {len(report.gone)} of {counted(len(report.tasks), 'task')}, {freed} {human_size(report.freed)}")
    if report.gone and not dry_run:
        out.hint("`icm materialize TASK -o DIR` decodes a code; `icm ingest --restore PATH` brings an original back")


def _cells(task: TaskEvicted) -> list[str]:
    return [
        task.task,
        _STATUS.get(task.status, task.status),
        human_size(task.freed) if task.adapters else "-",
        coded_size(task.code_size, task.residual_size),
        "-" if task.relative_error is None else f"{task.relative_error:.4f}",
        "-" if task.retained_gain is None else f"{task.retained_gain:.4f}",
    ]
