"""Print what sources were measured: by `icm eval`, or at the end of `icm train`."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NoReturn

from icm_cli.errors import Interrupted
from icm_cli.failures import tell_failure, tell_left_out
from icm_cli.output import Column
from icm_cli.session import Session
from icm_cli.text import errors_json
from icmlora.fleet.measure.precision import measured_in, source_name
from icmlora.io.text import counted

if TYPE_CHECKING:
    from icmlora.fleet.context import Event
    from icmlora.fleet.measure.evaluate import EvaluateReport, TaskEvaluated
    from icmlora.fleet.measure.measure import SourceResult
    from icmlora.fleet.measure.metric_result import MetricResult

_SHORT = {"perplexity": "ppl", "bits per byte": "bpb"}
_SOURCES = ("base", "original", "residual", "code", "generate", "network")


def interrupted(report: EvaluateReport) -> NoReturn:
    """Say how many tasks were measured until the user stopped it."""
    done = counted(len(report.tasks), "task")
    raise Interrupted(f"interrupted; {done} measured", hint="`icm eval` measures the rest")


def sum_up(session: Session, report: EvaluateReport) -> None:
    """Print a table of the results, and what was not measured and why."""
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
            f"retained gain of `{source_name(source)}`: mean {gain.mean:.3f}, worst {gain.worst:.3f} "
            f"({gain.worst_task}){measured_in(gain.precisions)}"
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
    tell_left_out(session.out, report.left_out, "not measured")


def _print_table(session: Session, tasks: list[TaskEvaluated], shown: list[str], with_gain: list[str]) -> None:
    names = dict.fromkeys(name for task in tasks for name in task.sources["base"].score.figures) or _SHORT
    figures = [name for name in names if name != "nats per token"]  # perplexity says the same
    columns = [Column("task", shrink=True)]
    words = list(map(source_name, shown))
    columns += [Column(f"{word} {_SHORT.get(name, name)}", right=True) for name in figures for word in words]
    for source in with_gain:
        columns += [Column(f"{source_name(source)} {figure}", right=True) for figure in ("gain", "error")]
    by_name = sorted(tasks, key=lambda task: task.task)
    session.out.table(columns, [_cells(task, figures, shown, with_gain) for task in by_name])


def tell_measured(session: Session, event: Event) -> None:
    """Report one task that is measured, or that failed."""
    from icmlora.fleet.measure.evaluate import TaskEvaluated

    tell_failure(session, event)
    if isinstance(event, TaskEvaluated):
        rungs = {source: _as_json(result) for source, result in event.sources.items()}
        session.out.event("task", task=event.task, precision=event.precision, rungs=rungs)
        if event.skipped is not None:
            session.out.detail(f"{event.task}: {event.skipped}")


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
