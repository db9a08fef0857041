"""`icm eval`: measure the sources of tasks on held-out text."""

from __future__ import annotations

import math
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from icm_cli.errors import ExitCode, Interrupted
from icm_cli.failures import tell_failure, tell_left_out
from icm_cli.options import DeviceOpt, ShardOpt, SomeTasksArg, WorkersOpt
from icm_cli.output import Column
from icm_cli.session import Session, command
from icm_cli.text import errors_json
from icmlora.fleet.measure.precision import measured_in
from icmlora.io.text import counted

if TYPE_CHECKING:
    from collections.abc import Callable

    from icmlora.fleet.api import Fleet
    from icmlora.fleet.context import Event
    from icmlora.fleet.measure.baselines import BaselineResult
    from icmlora.fleet.measure.compare import MethodSummary
    from icmlora.fleet.measure.evaluate import EvaluateReport, TaskEvaluated
    from icmlora.fleet.measure.measure import SourceResult
    from icmlora.fleet.measure.metric_result import MetricResult


class SourceName(StrEnum):
    """A source that can be measured; base model and original always are."""

    RESIDUAL = "residual"
    CODE = "code"
    GENERATE = "generate"
    NETWORK = "network"


DataOpt = Annotated[
    Path | None,
    typer.Option(
        "--data", metavar="FILE", help="File with held-out text. Default: the task's own.", show_default=False
    ),
]
SourceOpt = Annotated[
    list[SourceName] | None,
    typer.Option(
        "--rung", help="Measure only this source, with base model and original. Can be repeated.", show_default=False
    ),
]
TokensOpt = Annotated[int, typer.Option("--max-tokens", metavar="N", min=2, help="Tokens to score in each text.")]
AgainOpt = Annotated[bool, typer.Option("--again", help="Measure again what was measured on the same text before.")]
BaselineOpt = Annotated[
    list[str] | None,
    typer.Option(
        "--baseline",
        metavar="NAME,...",
        help="Also measure other methods: bf16, int8, nf4, 3bit, svd4, svd2-3bit, mean16, loraquant2, jd16, ... "
        "Nothing is stored.",
        show_default=False,
    ),
]

_TOKENS = 256
_SHORT = {"perplexity": "ppl", "bits per byte": "bpb"}
_METHOD_COLUMNS = ("bytes per task", "one more task", "of bf16", "relative error", "gain", "worst")
_SOURCES = ("base", "original", "residual", "code", "generate", "network")


@command
def evaluate(
    session: Session,
    tasks: SomeTasksArg = None,
    data: DataOpt = None,
    rung: SourceOpt = None,
    device: DeviceOpt = None,
    max_tokens: TokensOpt = _TOKENS,
    again: AgainOpt = False,
    baseline: BaselineOpt = None,
    workers: WorkersOpt = None,
    shard: ShardOpt = None,
) -> None:
    """Measure how good the base model, original, residual, code and generated adapter are on held-out examples.

    GAIN is the retained gain: (loss of base - loss of source) / (loss of base - loss of original). Each adapter is
    written to disk and loaded with PEFT before it is measured. Needs the base model. For an evicted original, icm uses
    what it measured before on the same text. With --baseline it also measures methods that need no training, and shows
    how many bytes each would take.

    Example:
      icm eval shakespeare
    """
    baselines = [name for names in baseline or [] for name in names.split(",") if name]

    def work(fleet: Fleet) -> EvaluateReport:
        return fleet.evaluate(
            tasks or [],
            sources=[name.value for name in rung] if rung else ("residual", "code", "generate"),
            data=data,
            max_tokens=max_tokens,
            baselines=baselines,
            device=session.device(device),
            again=again,
            workers=workers,
            shard=shard,
        )

    def print_more(report: EvaluateReport) -> None:
        if report.tasks and max_tokens != _TOKENS:
            usual = f"`icm eval` without --max-tokens measures {_TOKENS} tokens of each text"
            session.out.note(f"`icm stats` shows these figures until {usual}")
        if baselines:
            _print_methods(session, session.fleet.compare(report))

    if not run(session, work, print_more):
        raise typer.Exit(ExitCode.PARTLY)


def run(
    session: Session,
    work: Callable[[Fleet], EvaluateReport],
    print_more: Callable[[EvaluateReport], None] = lambda report: None,
) -> bool:
    """Measure, print a table of the results, and return whether no task failed."""
    report, stopped = session.run("eval", work, lambda event: _tell(session, event))
    _print_tasks(session, report)
    print_more(report)
    partly = tell_left_out(session.out, report.left_out, "not measured")
    if stopped:
        done = counted(len(report.tasks), "task")
        raise Interrupted(f"interrupted; {done} measured", hint="`icm eval` measures the rest")
    return not (report.failed or partly)


def _print_tasks(session: Session, report: EvaluateReport) -> None:
    shown = [source for source in _SOURCES if any(source in task.sources for task in report.tasks)]
    with_gain = [source for source in shown if source not in ("base", "original")]
    metrics = dict.fromkeys(task.sources["base"].score.metric for task in report.tasks) or {"": None}
    for metric in metrics:  # a table for each kind of base model
        tasks = [task for task in report.tasks if task.sources["base"].score.metric == metric]
        _print_table(session, tasks, shown, with_gain)
    for source in with_gain:
        gain = report.gain_of(source)
        if gain is None:
            continue
        figures = {"tasks": gain.tasks, "mean": gain.mean, "worst": gain.worst}
        session.out.event("mean", rung=source, **figures, precisions=list(gain.precisions))
        session.out.line(
            f"retained gain of `{source}`: mean {gain.mean:.3f}, worst {gain.worst:.3f} ({gain.worst_task})"
            f"{measured_in(gain.precisions)}"
        )
    notes = {
        "no held-out text, so not measured": report.without_data,
        "evicted before it was measured like this, so the retained gain is unknown": report.without_original,
        "changed by another icm meanwhile, so not everything was recorded": report.outdated,
        "not measured, see the warnings above": [failure.task for failure in report.failed],
    }
    for text, names in notes.items():
        if names:
            session.out.note(f"{text}: {', '.join(names)}")
    for note in report.notes:
        session.out.note(note)
    if said := measured_in(task.precision for task in report.tasks):
        session.out.note(f"measured on the base model in{said}")


def _print_table(session: Session, tasks: list[TaskEvaluated], shown: list[str], with_gain: list[str]) -> None:
    names = dict.fromkeys(name for task in tasks for name in task.sources["base"].score.figures) or _SHORT
    figures = [name for name in names if name != "nats per token"]  # perplexity says the same
    columns = [Column("task", shrink=True)]
    columns += [Column(f"{source} {_SHORT.get(name, name)}", right=True) for name in figures for source in shown]
    for source in with_gain:
        columns += [Column(f"{source} gain", right=True), Column(f"{source} error", right=True)]
    by_name = sorted(tasks, key=lambda task: task.task)
    session.out.table(columns, [_cells(task, figures, shown, with_gain) for task in by_name])


def _print_methods(session: Session, rows: list[MethodSummary]) -> None:
    for row in rows:
        session.out.event("method", **asdict(row))
    columns = [Column("method"), *(Column(title, right=True) for title in _METHOD_COLUMNS), Column("worst task")]
    session.out.line()
    session.out.table(columns, [_method_cells(row) for row in rows])


def _tell(session: Session, event: Event) -> None:
    from icmlora.fleet.measure.evaluate import TaskEvaluated

    tell_failure(session, event)
    if isinstance(event, TaskEvaluated):
        rungs = {source: _as_json(result) for source, result in event.sources.items()}
        others = {name: _baseline_as_json(result) for name, result in event.baselines.items()}
        more = {"baselines": others} if others else {}
        session.out.event("task", task=event.task, precision=event.precision, rungs=rungs, **more)
        if event.skipped is not None:
            session.out.detail(f"{event.task}: {event.skipped}")


def _baseline_as_json(result: BaselineResult) -> dict[str, object]:
    sizes = {"size": result.size, "shared_size": result.shared_size, "fleet_size": result.fleet_size}
    figures = {"retained_gain": result.retained_gain, **errors_json(result.squared_error)}
    return sizes | _score_as_json(result.score) | figures


def _as_json(result: SourceResult) -> dict[str, object]:
    figures = {"retained_gain": result.retained_gain, **errors_json(result.squared_error)}
    return _score_as_json(result.score) | figures


def _score_as_json(score: MetricResult) -> dict[str, object]:
    """Return the metric under its own name, and for language models what follows from it."""
    figures = {name: value if math.isfinite(value) else None for name, value in score.figures.items()}
    keys: dict[str, object] = {"metric": score.metric, "value": score.value, "count": score.count}
    if "perplexity" in figures:
        keys["tokens"] = score.count
    return keys | {name.replace(" ", "_"): value for name, value in figures.items()}


def _method_cells(row: MethodSummary) -> list[str]:
    sizes = [f"{row.task_size:,.0f}", f"{row.marginal_size:,.0f}", f"{100 * row.share:.2f} %"]
    figures = [_figure(value, 3) for value in (row.relative_error, row.mean, row.worst)]
    return [row.method, *sizes, *figures, row.worst_task or "-"]


def _cells(task: TaskEvaluated, figures: list[str], shown: list[str], with_gain: list[str]) -> list[str]:
    found = {str(source): result for source, result in task.sources.items()}
    cells = [task.task]
    for name in figures:
        values = [found[source].score.figures.get(name) if source in found else None for source in shown]
        cells += [_figure(value, 2 if name == "perplexity" else 3) for value in values]
    for source in with_gain:
        result = found.get(source)
        cells += [_figure(None if result is None else result.retained_gain, 3)]
        cells += [_figure(None if result is None else result.relative_error, 3)]
    return cells


def _figure(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
