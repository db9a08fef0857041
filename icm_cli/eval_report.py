"""Print the measurements of `icm eval`, also at the end of `icm train`."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING

from icm_cli.output import Field
from icm_cli.report import print_skipped
from icm_cli.session import Session
from icm_cli.text import SOURCES, errors_json, figure
from icmlora.fleet.measure.metric_result import MetricResult, measured_in
from icmlora.fleet.measure.report import TaskEvaluated
from icmlora.io.text import counted

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    from icmlora.fleet.context import Event
    from icmlora.fleet.measure.measure import SourceResult
    from icmlora.fleet.measure.report import EvaluateReport
    from registry.manifests import Source

MEASURE_REST = "run `icm eval` to measure the rest"
"""Hint after an interruption."""
_Row = tuple[str, "Mapping[Source, SourceResult]"]
"""Name and results of a task, with or without its context."""
_SHORT = {"perplexity": "ppl", "bits per byte": "bpb"}


def measured(report: EvaluateReport) -> str:
    """Return the number of measured tasks as text."""
    return f"measured {counted(len(report.done), 'task')}"


def sum_up(session: Session, report: EvaluateReport) -> None:
    """Print tables of the results, and the skipped tasks with reasons."""
    shown = [source for source in SOURCES if any(source in task.sources for task in report.done)]
    with_gain = [source for source in shown if source not in ("base", "original")]
    metrics = dict.fromkeys(task.sources["base"].score.metric for task in report.done) or {"": None}
    for metric in metrics:  # one table per kind of base model
        tasks = [task for task in report.done if task.sources["base"].score.metric == metric]
        _print_table(session, tasks, shown, with_gain)
    for source in with_gain:
        gain = report.gain_of(source)
        if gain is None:
            continue
        figures = {"tasks": gain.tasks, "mean": gain.mean, "worst": gain.worst}
        session.out.event("mean", source=source, **figures, precisions=list(gain.precisions))
        session.out.line(
            f"retained gain of `{source}`: mean {gain.mean:.3f}, worst {gain.worst:.3f} "
            f"({gain.worst_task}){measured_in(gain.precisions)}"
        )
    for task in report.done:
        scores = {source: result.score for source, result in task.sources.items()}
        if sentence := no_gain(task.task, scores, [task.sources[s].retained_gain for s in with_gain if s in scores]):
            session.out.line(sentence)
    notes = {
        "not measured, no held-out text": report.without_data,
        "retained gain unknown, original evicted before this measurement": report.without_original,
        "not fully recorded, changed by another icm process": report.outdated,
        "not measured, see the warnings above": [failure.task for failure in report.failed],
    }
    for text, names in notes.items():
        if names:
            session.out.note(f"{text}: {', '.join(names)}")
    for note in report.notes:
        session.out.note(note)
    if precision := measured_in(task.precision for task in report.done):
        session.out.note(f"measured with the base model in{precision}")
    for group in report.skipped:
        print_skipped(session, group, "no measurements")


def _print_table(session: Session, tasks: list[TaskEvaluated], shown: list[Source], with_gain: list[Source]) -> None:
    names = dict.fromkeys(name for task in tasks for name in task.sources["base"].score.figures) or _SHORT
    figures = [name for name in names if name != "nats per token"]  # redundant with perplexity
    fields: list[Field[_Row]] = [Field("task", lambda row: row[0], shrink=True)]
    for name in figures:
        short, digits = _SHORT.get(name, name), 2 if name == "perplexity" else 3
        fields += [_field(source, short, partial(_metric, name), digits) for source in shown]
    gaining = shown if any(task.with_context for task in tasks) else with_gain
    for source in gaining:
        fields.append(_field(source, "gain", lambda found: found.retained_gain))
    for source in with_gain:
        fields.append(_field(source, "error", lambda found: found.relative_error))
    rows: list[_Row] = []
    for task in sorted(tasks, key=lambda task: task.task):
        rows.append((task.task, task.sources))
        rows += [(f"{task.task} + context", task.with_context)] if task.with_context else []
    session.out.listing(fields, rows)


def _metric(name: str, found: SourceResult) -> float | None:
    return found.score.figures.get(name)


def _field(source: Source, title: str, value: Callable[[SourceResult], float | None], digits: int = 3) -> Field[_Row]:
    """Return the column for a figure of one source."""

    def cell(row: _Row) -> str:
        return figure(value(row[1][source]) if source in row[1] else None, digits)

    return Field(f"{source} {title}", cell, right=True)


def no_gain(task: str, scores: Mapping[Source, MetricResult], gains: Collection[float | None]) -> str | None:
    """Return a sentence for a task whose original is no better than its base model, else None."""
    if not {"base", "original"} <= scores.keys() or not gains or any(gain is not None for gain in gains):
        return None
    base, original = scores["base"], scores["original"]
    figures = f"{original.metric} {original.value:.3f} against {base.value:.3f}"
    return (
        f"{task}: the original is no better than the base model on this text ({figures}), so there is no retained gain"
    )


def print_measured(session: Session, event: Event) -> None:
    """Print a measured task as a JSON line, and details about its rows."""
    if isinstance(event, TaskEvaluated):
        sources, with_context = (
            {source: _as_json(result) for source, result in results.items()}
            for results in (event.sources, event.with_context)
        )
        fields = {"task": event.task, "precision": event.precision, "sources": sources, "with_context": with_context}
        session.out.event("task", **fields)
        if event.skipped is not None:
            session.out.detail(f"{event.task}: {event.skipped}")


def _as_json(result: SourceResult) -> dict[str, object]:
    """Return the metric, the figures derived from it, the retained gain and the error for JSON."""
    score = result.score
    figures = {name: value if math.isfinite(value) else None for name, value in score.figures.items()}
    keys: dict[str, object] = {"metric": score.metric, "value": score.value, "count": score.count}
    if "perplexity" in figures:
        keys["tokens"] = score.count
    keys |= {name.replace(" ", "_"): value for name, value in figures.items()}
    return keys | {"retained_gain": result.retained_gain, **errors_json(result.squared_error)}
