"""`icm encode`: give tasks the smallest codes, or residuals beside them, that keep what is asked for."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from icm_cli.errors import ExitCode, Interrupted, UsageProblem
from icm_cli.options import BaseModelOpt, DeviceOpt, SomeTasksArg, gain_option, loss_option
from icm_cli.output import Column
from icm_cli.session import Session, command
from icm_cli.text import coded_size
from icmlora.io.text import counted, human_size

if TYPE_CHECKING:
    from icmlora.fleet.context import Event
    from icmlora.fleet.search import EncodeReport, EncodeRequest, TaskEncoded

ErrorOpt = Annotated[float | None, loss_option("--max-error", "Largest relative dW error that a code may have.")]
GainOpt = Annotated[
    float | None,
    gain_option("Smallest retained gain that a code may have, on the task's held-out text; needs the base model."),
]
ToleranceOpt = Annotated[
    float | None,
    loss_option(
        "--tolerance",
        "Share of dW's energy, weighted by sensitivity, that a code may lose, as `icm train --quality` sets it.",
    ),
]
RefineOpt = Annotated[
    int,
    typer.Option(
        "--refine",
        metavar="STEPS",
        min=0,
        help="Then fit the code to what the adapter does on the task's samples; needs the base model. 40 is a start.",
    ),
]

ResidualOpt = Annotated[
    bool,
    typer.Option(
        "--residual",
        help="Leave the codes as they are, and put beside each what it lacks to keep the limit; nothing where it does.",
    ),
]

_COLUMNS = (
    Column("task", shrink=True),
    Column("result"),
    Column("code", right=True),
    Column("before", right=True),
    Column("dW error", right=True),
    Column("retained gain", right=True),
)
AgainOpt = Annotated[bool, typer.Option("--again", help="Also tasks whose present code was made for the very same.")]
_STATUS = {
    "known": "as it was",
    "enough": "code is enough",
    "below": "keeps its original",
    "evicted": "original gone",
    "unmeasured": "not measured",
}


@command
def encode(
    session: Session,
    tasks: SomeTasksArg = None,
    max_error: ErrorOpt = None,
    min_gain: GainOpt = None,
    tolerance: ToleranceOpt = None,
    refine: RefineOpt = 0,
    residual: ResidualOpt = False,
    base_model: BaseModelOpt = None,
    device: DeviceOpt = None,
    again: AgainOpt = False,
) -> None:
    """Give tasks the smallest codes that keep a fidelity, under the present generator; nothing is trained.

    A task that no code keeps well enough gets its most faithful one and should keep its original: `icm evict` with the
    same --min-gain or --max-error leaves it. Exit 3 says that there are such tasks, and `icm stats` too.

    A task whose code was made for the same limits before is left as it is, so a run that was stopped goes on with the
    same command. --again makes them all.

    With --residual the codes stay, for use where bytes count, and code and residual together keep the limit.

    Example:
      icm encode --min-gain 0.98
    """
    if max_error is None and min_gain is None and tolerance is None:
        hint = "`--min-gain 0.98` limits the loss of retained gain, `--max-error 0.1` the relative dW error"
        raise UsageProblem("what a code has to keep was not said: give --min-gain or --max-error", hint=hint)
    if refine and max_error is not None:
        hint = "`--min-gain` measures what refined codes do"
        raise UsageProblem("--refine leaves the weights for the function: it does not go with --max-error", hint=hint)
    if refine and residual:
        hint = "refine codes first, then put residuals beside them"
        raise UsageProblem("--residual leaves the codes as they are: it does not go with --refine", hint=hint)
    from icmlora.fleet.search import EncodeRequest

    request = EncodeRequest(
        names=tasks or [],
        max_error=max_error,
        min_gain=min_gain,
        device=session.device(device),
        tolerance=tolerance,
        refine=refine,
        base_model=base_model,
        residual=residual,
        again=again,
    )
    if run(session, request):
        raise typer.Exit(ExitCode.PARTLY)


def run(session: Session, request: EncodeRequest, *, go_on: str = "run the same command to go on") -> bool:
    """Encode, show what became of each task, and say whether a task fell short; `go_on` is what to do if stopped."""
    # torch is imported from here on; a wrong command line is answered at once.
    from icmlora.fleet.encode import encode as work

    with session.stoppable() as stop:
        report = session.follow(work(session.context, request, stop), "encode", partial(_tell, session))
    _sum_up(session, report)
    if not report.short and not report.stopped and any(task.status != "evicted" for task in report.tasks):
        session.out.hint(_hint(request))
    if report.stopped:
        done = counted(len(report.tasks), "task")
        raise Interrupted(f"interrupted; {done} encoded", hint=go_on)
    return bool(report.short)


def _tell(session: Session, event: Event) -> None:
    from icmlora.fleet.search import TaskEncoded

    if isinstance(event, TaskEncoded):
        session.out.event("task", **asdict(event))


def _sum_up(session: Session, report: EncodeReport) -> None:
    out = session.out
    now = sum((task.size or 0) + (task.residual_size or 0) for task in report.tasks)
    before = sum(task.before or 0 for task in report.tasks)
    out.event("summary", tasks=len(report.tasks), short=len(report.short), size=now, before=before)
    out.table(_COLUMNS, [_cells(task) for task in report.tasks])
    for task in report.tasks:
        if task.reason:
            out.line(f"{task.task}: {task.reason}")
    out.line(
        f"{counted(len(report.tasks), 'task')} of together {human_size(now)}, before {human_size(before)}; "
        f"{len(report.short)} below what was asked for"
    )


def _hint(request: EncodeRequest) -> str:
    limits = (("--max-error", request.max_error), ("--min-gain", request.min_gain))
    same = " ".join(f"{option} {limit:g}" for option, limit in limits if limit is not None)
    return (
        f"`icm evict {same or '--min-gain GAIN'}` deletes the originals of tasks that keep {'that' if same else 'it'}"
    )


def _cells(task: TaskEncoded) -> list[str]:
    return [
        task.task,
        _STATUS.get(task.status, task.status),
        coded_size(task.size, task.residual_size),
        "-" if task.before is None else human_size(task.before),
        "-" if task.dw_error is None else f"{task.dw_error:.4f}",
        "-" if task.retained_gain is None else f"{task.retained_gain:.4f}",
    ]
