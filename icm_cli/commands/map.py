"""`icm map`: which tasks are near each other by their vectors."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from icm_cli.errors import UsageProblem
from icm_cli.options import BaseModelOpt
from icm_cli.output import Column
from icm_cli.session import Session, command
from icmlora.io.text import counted, human_percent

if TYPE_CHECKING:
    from icmlora.fleet.pictures import MappedFleet
    from icmlora.task_vectors.clusters import MappedTask


class View(StrEnum):
    """How a task vector was made."""

    ADAPTED = "adapted"
    CONTEXT = "context"


ViewOpt = Annotated[
    View, typer.Option("--view", help="Which vectors: of the base model with the adapter, or of it alone on samples.")
]
ClustersOpt = Annotated[
    str,
    typer.Option("--clusters", metavar="N|auto", help="How many clusters; auto takes the best mean silhouette."),
]
PlotOpt = Annotated[
    Path | None, typer.Option("--plot", metavar="FILE.svg", help="Also draw the map.", show_default=False)
]
ReplaceOpt = Annotated[bool, typer.Option("--force", "-f", help="Replace FILE.svg if it exists.")]

_CLUSTERS = (
    Column("cluster", right=True),
    Column("silhouette", right=True),
    Column("tasks", shrink=True),
)
_PAIRS = (Column("nearest pairs"), Column(""), Column("distance", right=True), Column(""))
_TASKS = (
    Column("task", shrink=True),
    Column("cluster", right=True),
    Column("silhouette", right=True),
    Column("nearest", shrink=True),
    Column("distance", right=True),
)
# What a mean silhouette is called (Kaufman and Rousseeuw 1990).
_WORDS = ((0.7, "strong"), (0.5, "reasonable"), (0.25, "weak"))


@command
def map_(
    session: Session,
    view: ViewOpt = View.ADAPTED,
    base_model: BaseModelOpt = None,
    clusters: ClustersOpt = "auto",
    plot: PlotOpt = None,
    force: ReplaceOpt = False,
) -> None:
    """Show which tasks are near each other by their vectors, and which clusters they form.

    A distance is 0 in the same direction from the mean of the fleet, 1 with nothing in common, 2 opposite. SILHOUETTE
    is 1 deep inside, 0 on the border, below 0 nearer to another: of support sets by task it says whether tasks can be
    told apart, of tasks by cluster whether clusters can. With -v, one row per task. With --quiet, one cluster a line.

    Example:
      icm map --plot map.svg
    """
    from icmlora.fleet.map import MapRequest, map_fleet

    request = MapRequest(view.value, base_model, _number(clusters), plot, force)
    found = map_fleet(session.context, request)
    session.out.document(_as_json(found, plot))
    if session.out.is_quiet:
        for members in found.map.clusters:
            session.out.answer(" ".join(task.name for task in members))
    _print(session, found)
    if plot is not None:
        session.out.note(f"drew {plot}")


def _number(clusters: str) -> int | None:
    if clusters == "auto":
        return None
    if not clusters.isascii() or not clusters.isdigit() or int(clusters) < 1:
        raise UsageProblem(f"--clusters {clusters!r} is no number", hint="give a number from 1, or auto")
    return int(clusters)


def _print(session: Session, found: MappedFleet) -> None:
    from icmlora.fleet.pictures import grouped_reasons

    out, tasks = session.out, found.map.tasks
    out.record(_summary(found))
    out.line()
    out.table(_CLUSTERS, [_cluster_cells(members) for members in found.map.clusters])
    out.line()
    pairs = [[*pair.tasks, f"{pair.distance:.3f}", "alike" if pair.is_alike else ""] for pair in found.map.pairs]
    out.table(_PAIRS, pairs)
    if out.verbosity:
        out.line()
        out.table(_TASKS, [_task_cells(task) for task in tasks])
    alike = sum(pair.is_alike for pair in found.map.pairs)
    if alike:
        out.line()
        why = "their vectors hardly differ more than those of one task's support sets"
        out.line(f"{counted(alike, 'pair')} cannot be told apart: {why}")
    outliers = [f"{task.name} ({task.nearest.task}, {task.nearest.distance:.3f})" for task in tasks if task.is_outlier]
    if outliers:
        out.line()
        out.line(f"far from everything, even the nearest task: {', '.join(outliers)}")
    for reason in grouped_reasons(found.left_out):
        out.note(f"not on the map, {reason}")
    if any(entry.reason == "no vectors" for entry in found.left_out):
        out.hint("`icm vectors` makes the vectors that are missing")


def _summary(found: MappedFleet) -> list[tuple[str, str]]:
    shown = found.map
    across, up = shown.variation
    return [
        ("base model", found.base_model),
        ("vectors", f"{found.view} view, {counted(len(shown.tasks), 'task')}, {found.support_sets} support sets"),
        ("silhouette by task", _judged(shown.silhouette_by_task)),
        ("silhouette by cluster", _judged(shown.silhouette_by_cluster)),
        ("median distance", f"{shown.typical:.3f}"),
        ("plane of the picture", f"{human_percent(across + up)} of the variation"),
    ]


def _judged(silhouette: float | None) -> str:
    if silhouette is None:
        return "-"
    word = next((word for least, word in _WORDS if silhouette > least), "hardly any")
    return f"{silhouette:.3f} ({word} structure)"


def _cluster_cells(members: tuple[MappedTask, ...]) -> list[str]:
    mean = sum(task.silhouette for task in members) / len(members)
    names = ", ".join(task.name for task in members)
    return [str(members[0].cluster), "-" if len(members) == 1 else f"{mean:.3f}", names]


def _task_cells(task: MappedTask) -> list[str]:
    near = task.nearest
    return [task.name, str(task.cluster), f"{task.silhouette:.3f}", near.task, f"{near.distance:.3f}"]


def _as_json(found: MappedFleet, plot: Path | None) -> dict[str, object]:
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
