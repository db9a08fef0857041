"""`icm map`: compare tasks by their vectors."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from icm_cli.errors import ExitCode, UsageProblem
from icm_cli.options import BaseModelOpt, option
from icm_cli.output import Field
from icm_cli.session import Session, command
from icmlora.io.text import counted, human_percent

if TYPE_CHECKING:
    from icmlora.fleet.map.map import MapReport
    from icmlora.task_vectors.map import MappedTask, Pair


ViewOpt = Annotated[
    Literal["adapted", "context"],
    option("--view", "Vectors to compare: with the adapter (adapted) or of the base model alone (context)."),
]
ClustersOpt = Annotated[str, option("--clusters N|auto", "Number of clusters; auto picks the best mean silhouette.")]
PlotOpt = Annotated[Path | None, option("--plot FILE.svg", "Also draw the map to this file.")]
ReplaceOpt = Annotated[bool, option("--force -f", "Replace the --plot FILE if it exists.")]

_CLUSTERS: tuple[Field[tuple[MappedTask, ...]], ...] = (
    Field("cluster", lambda members: str(members[0].cluster), right=True),
    Field("silhouette", lambda members: _silhouette(members), right=True),
    Field("tasks", lambda members: ", ".join(task.name for task in members), shrink=True),
)
_PAIRS: tuple[Field[Pair], ...] = (
    Field("nearest pairs", lambda pair: pair.tasks[0]),
    Field("", lambda pair: pair.tasks[1]),
    Field("distance", lambda pair: f"{pair.distance:.3f}", right=True),
    Field("", lambda pair: "alike" if pair.is_alike else ""),
)
_TASKS: tuple[Field[MappedTask], ...] = (
    Field("task", lambda task: task.name, shrink=True),
    Field("cluster", lambda task: str(task.cluster), right=True),
    Field("silhouette", lambda task: f"{task.silhouette:.3f}", right=True),
    Field("nearest", lambda task: task.nearest.task, shrink=True),
    Field("distance", lambda task: f"{task.nearest.distance:.3f}", right=True),
)
# What a mean silhouette is called (Kaufman and Rousseeuw 1990).
_WORDS = ((0.7, "strong"), (0.5, "reasonable"), (0.25, "weak"))


@command
def map_(
    session: Session,
    view: ViewOpt = "adapted",
    base_model: BaseModelOpt = None,
    clusters: ClustersOpt = "auto",
    plot: PlotOpt = None,
    force: ReplaceOpt = False,
) -> None:
    """Show which tasks are alike, by their task vectors, and which clusters they form.

    DISTANCE is the cosine distance from the mean of the fleet: 0 is the same direction, 1 unrelated, 2 opposite.
    SILHOUETTE is 1 well inside a group, 0 on its border, and below 0 if another group is nearer. By task it says
    whether the support sets of different tasks can be told apart; by cluster, whether the clusters can. -v adds a row
    per task; --quiet prints one cluster per line.

    Example:
      icm map --plot map.svg
    """
    from icmlora.fleet.map.map import map_fleet

    found = map_fleet(
        session.context, view=view, base_model=base_model, clusters=_number(clusters), plot=plot, force=force
    )
    session.out.document(_as_json(found, plot))
    session.out.names(" ".join(task.name for task in members) for members in found.map.clusters)
    _print(session, found)
    if plot is not None:
        session.out.note(f"drew {plot}")
    if any(entry.is_damaged for entry in found.left_out):
        raise typer.Exit(ExitCode.PARTLY)


def _number(clusters: str) -> int | None:
    if clusters == "auto":
        return None
    if not clusters.isascii() or not clusters.isdigit() or int(clusters) < 1:
        raise UsageProblem(f"--clusters {clusters!r} is not a number", hint="use a number from 1, or auto")
    return int(clusters)


def _print(session: Session, found: MapReport) -> None:
    out, tasks = session.out, found.map.tasks
    out.record(_summary(found))
    out.line()
    out.listing(_CLUSTERS, found.map.clusters)
    out.line()
    out.listing(_PAIRS, found.map.pairs)
    if out.verbosity:
        out.line()
        out.listing(_TASKS, tasks)
    alike = sum(pair.is_alike for pair in found.map.pairs)
    if alike:
        out.line()
        why = "their vectors differ little more than those of support sets of the same task"
        out.line(f"{counted(alike, 'pair')} of tasks cannot be told apart: {why}")
    outliers = [f"{task.name} ({task.nearest.task}, {task.nearest.distance:.3f})" for task in tasks if task.is_outlier]
    if outliers:
        out.line()
        out.line(f"far from every other task (nearest task, distance): {', '.join(outliers)}")
    for reason in found.reasons:
        out.note(f"not on the map, {reason}")
    if any(entry.is_damaged for entry in found.left_out):
        out.hint("`icm vectors --again TASK` makes the vectors of a task again")
    if any(entry.reason == "no vectors" for entry in found.left_out):
        out.hint("run `icm vectors` to extract the missing vectors")


def _summary(found: MapReport) -> list[tuple[str, str]]:
    shown = found.map
    across, up = shown.variation
    return [
        ("base model", found.base_model),
        ("vectors", f"{found.view} view, {counted(len(shown.tasks), 'task')}, {found.support_sets} support sets"),
        ("silhouette by task", _judged(shown.silhouette_by_task)),
        ("silhouette by cluster", _judged(shown.silhouette_by_cluster)),
        ("median distance", f"{shown.typical:.3f}"),
        ("shown in the picture", f"{human_percent(across + up)} of the variation"),
    ]


def _judged(silhouette: float | None) -> str:
    if silhouette is None:
        return "-"
    word = next((word for least, word in _WORDS if silhouette > least), "hardly any")
    return f"{silhouette:.3f} ({word} structure)"


def _silhouette(members: tuple[MappedTask, ...]) -> str:
    return "-" if len(members) == 1 else f"{sum(task.silhouette for task in members) / len(members):.3f}"


def _as_json(found: MapReport, plot: Path | None) -> dict[str, object]:
    shown = found.map
    return {
        "base_model": found.base_model,
        "view": found.view,
        "support_sets_count": found.support_sets,
        "silhouette_by_task": shown.silhouette_by_task,
        "silhouette_by_cluster": shown.silhouette_by_cluster,
        "median_distance": shown.typical,
        "variation": list(shown.variation),
        "clusters": [[task.name for task in members] for members in shown.clusters],
        "tasks": [
            {
                "task": task.name,
                "cluster": task.cluster,
                "silhouette": task.silhouette,
                "x": task.point[0],
                "y": task.point[1],
                "nearest": task.nearest.task,
                "distance": task.nearest.distance,
                "is_outlier": task.is_outlier,
            }
            for task in shown.tasks
        ],
        "pairs": [
            {"tasks": list(pair.tasks), "distance": pair.distance, "is_alike": pair.is_alike} for pair in shown.pairs
        ],
        "left_out": [{"task": entry.task, "reason": entry.reason} for entry in found.left_out],
        "plot": None if plot is None else str(plot),
    }
