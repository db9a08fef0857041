"""`icm eval`: measure what every rung of a task does on held-out text."""

from __future__ import annotations

import math
from dataclasses import asdict
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from icm_cli.errors import Interrupted
from icm_cli.options import DeviceOpt, SomeTasksArg
from icm_cli.output import Column
from icm_cli.session import Session, command
from icmlora.io.text import counted

if TYPE_CHECKING:
    from icmlora.base_models.likelihood import NllResult
    from icmlora.fleet.context import Event
    from icmlora.fleet.evaluate import BaselineResult, EvaluateReport, MethodSummary, TaskEvaluated
    from icmlora.fleet.measure import RungResult


class RungName(StrEnum):
    """A rung that can be measured; base model and original always are."""

    RESIDUAL = "residual"
    CODE = "code"
    GENERATE = "generate"


DataOpt = Annotated[
    Path | None,
    typer.Option("--data", metavar="FILE", help="Held-out JSON lines; else the task's own.", show_default=False),
]
RungOpt = Annotated[
    list[RungName] | None,
    typer.Option("--rung", help="Only these rungs beside base model and original.", show_default=False),
]
TokensOpt = Annotated[int, typer.Option("--max-tokens", metavar="N", min=2, help="Tokens scored of each text.")]
AgainOpt = Annotated[bool, typer.Option("--again", help="Measure again what was measured on this text before.")]

BaselineOpt = Annotated[
    list[str] | None,
    typer.Option(
        "--baseline",
        metavar="NAME,...",
        help="Other methods to measure on the same text: bf16, int8, nf4, 3bit, svd4, svd2-3bit, mean16, loraquant2, "
        "jd16, ... Nothing of them is stored.",
        show_default=False,
    ),
]

_TOKENS = 256
_METHOD_COLUMNS = ("bytes a task", "of one more", "of bf16", "dW err", "gain", "worst")
_RUNGS = ("base", "original", "residual", "code", "generate")


@command
def evaluate(
    session: Session,
    tasks: SomeTasksArg = None,
    data: DataOpt = None,
    rung: RungOpt = None,
    device: DeviceOpt = None,
    max_tokens: TokensOpt = _TOKENS,
    again: AgainOpt = False,
    baseline: BaselineOpt = None,
) -> None:
    """Measure perplexity and bits per byte of base model, original, residual, code and generated adapter, side by side.

    GAIN is the retained gain: (loss of base - loss of rung) / (loss of base - loss of original). Adapters are written
    to disk and loaded by PEFT before they are measured. Needs the base model. Of an evicted original, what was measured
    before on the same text counts. With --baseline, methods that need no training are measured beside the rungs, with
    the bytes that each would take.

    Example:
      icm eval shakespeare
    """
    from icmlora.fleet.evaluate import EvaluateRequest
    from icmlora.fleet.evaluate import evaluate as measure

    request = EvaluateRequest(
        names=tasks or [],
        device=session.device(device),
        rungs=[name.value for name in rung] if rung else ("residual", "code", "generate"),
        data=data,
        max_tokens=max_tokens,
        again=again,
        baselines=[name for names in baseline or [] for name in names.split(",") if name],
    )
    with session.stoppable() as stop:
        report = session.follow(measure(session.context, request, stop), "eval", partial(tell, session))
    print_tasks(session, report)
    if report.tasks and max_tokens != _TOKENS:
        usual = f"`icm eval` without --max-tokens measures {_TOKENS} tokens of each text"
        session.out.note(f"this is what `icm stats` shows until {usual}")
    if request.baselines:
        print_methods(session, report)
    check_finished(report)


def print_tasks(session: Session, report: EvaluateReport) -> None:
    """Print the table of a report, with means over its tasks."""
    from icmlora.fleet.evaluate import summarise

    shown = [rung for rung in _RUNGS if any(rung in task.rungs for task in report.tasks)]
    gains = [rung for rung in shown if rung not in ("base", "original")]
    columns = [Column("task", shrink=True)]
    columns += [Column(f"{rung} ppl", right=True) for rung in shown]
    columns += [Column(f"{rung} bpb", right=True) for rung in shown]
    for rung in gains:
        columns += [Column(f"{rung} gain", right=True), Column(f"{rung} dW err", right=True)]
    session.out.table(columns, [_cells(task, shown, gains) for task in report.tasks])
    for rung in gains:
        summary = summarise(report, rung)
        if summary is None:
            continue
        session.out.event("mean", rung=rung, tasks=summary.tasks, mean=summary.mean, worst=summary.worst)
        session.out.line(
            f"retained gain of `{rung}`: mean {summary.mean:.3f}, worst {summary.worst:.3f} ({summary.worst_task})"
        )
    if report.without_data:
        session.out.note(f"without held-out text, so not measured: {', '.join(report.without_data)}")
    if report.without_original:
        names = ", ".join(report.without_original)
        session.out.note(f"evicted before it was measured on this text, so the retained gain is unknown: {names}")
    if report.outdated:
        names = ", ".join(report.outdated)
        session.out.note(f"changed by another icm meanwhile, so not all that was measured is recorded: {names}")


def print_methods(session: Session, report: EvaluateReport) -> None:
    """Print every method with its bytes, most bytes first."""
    from icmlora.fleet.evaluate import compare
    from icmlora.fleet.stats import bill

    rows = compare(report, bill(session.context))
    for row in rows:
        session.out.event("method", **asdict(row))
    columns = [Column("method"), *(Column(title, right=True) for title in _METHOD_COLUMNS), Column("worst task")]
    session.out.line()
    session.out.table(columns, [_method_cells(row) for row in rows])


def check_finished(report: EvaluateReport) -> None:
    """Raise if the user stopped the evaluation.

    Raises:
        Interrupted: It was stopped.
    """
    if report.stopped:
        done = counted(len(report.tasks), "task")
        raise Interrupted(f"interrupted; {done} measured", hint="`icm eval` goes on with the others")


def tell(session: Session, event: Event) -> None:
    """Report one task that is measured."""
    from icmlora.fleet.evaluate import TaskEvaluated

    if isinstance(event, TaskEvaluated):
        rungs = {rung: _as_json(result) for rung, result in event.rungs.items()}
        others = {name: _baseline_as_json(result) for name, result in event.baselines.items()}
        session.out.event("task", task=event.task, rungs=rungs, **({"baselines": others} if others else {}))


def _baseline_as_json(result: BaselineResult) -> dict[str, object]:
    sizes = {"size": result.size, "shared_size": result.shared_size, "fleet_size": result.fleet_size}
    return sizes | _loss_as_json(result.loss) | {"retained_gain": result.retained_gain, "dw_error": result.dw_error}


def _as_json(result: RungResult) -> dict[str, object]:
    figures = {"retained_gain": result.retained_gain, "dw_error": result.dw_error}
    return _loss_as_json(result.as_loss()) | figures


def _loss_as_json(loss: NllResult) -> dict[str, object]:
    return {
        "nats_per_token": loss.nats_per_token,
        "perplexity": loss.perplexity if math.isfinite(loss.perplexity) else None,
        "bits_per_byte": loss.bits_per_byte,
        "tokens": loss.tokens,
    }


def _method_cells(row: MethodSummary) -> list[str]:
    sizes = [f"{row.task_size:,.0f}", f"{row.marginal_size:,.0f}", f"{100 * row.share:.2f} %"]
    figures = [_figure(value, 3) for value in (row.dw_error, row.mean, row.worst)]
    return [row.method, *sizes, *figures, row.worst_task or "-"]


def _cells(task: TaskEvaluated, shown: list[str], gains: list[str]) -> list[str]:
    found = {str(rung): result for rung, result in task.rungs.items()}
    losses = [found[rung].as_loss() if rung in found else None for rung in shown]
    cells = [task.task]
    cells += ["-" if loss is None else f"{loss.perplexity:.2f}" for loss in losses]
    cells += ["-" if loss is None else f"{loss.bits_per_byte:.3f}" for loss in losses]
    for rung in gains:
        result = found.get(rung)
        cells += [_figure(None if result is None else result.retained_gain, 3)]
        cells += [_figure(None if result is None else result.dw_error, 3)]
    return cells


def _figure(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
