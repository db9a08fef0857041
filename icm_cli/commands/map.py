"""`icm map`: compare tasks by their vectors."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from icm_cli.command import Call, command
from icm_cli.errors import ExitCode
from icm_cli.output import Field
from icm_cli.session import Session
from icm_cli.text import grouped
from icmlora.fleet.map.map import map_fleet
from icmlora.io.text import counted, human_percent, some

if TYPE_CHECKING:
    from icmlora.fleet.map.task_map import MapReport
    from icmlora.task_vectors.map import MappedTask, Pair


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
# Names for ranges of the mean silhouette (Kaufman and Rousseeuw 1990).
_WORDS = ((0.7, "strong"), (0.5, "reasonable"), (0.25, "weak"))


@command(map_fleet)
def map_(session: Session, call: Call[MapReport]) -> None:
    found, plot = call.now(), call["plot"]
    session.out.document(_as_json(found, plot))
    session.out.names(" ".join(task.name for task in members) for members in found.map.clusters)
    _print(session, found)
    if plot is not None:
        session.out.note(f"drew {plot}")
    if any(entry.is_damaged for entry in found.left_out):
        raise typer.Exit(ExitCode.PARTLY)


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
        why = "their vectors differ little more than two support sets of the same task"
        out.line(f"cannot distinguish {counted(alike, 'pair')} of tasks: {why}")
    outliers = [f"{task.name} ({task.nearest.task}, {task.nearest.distance:.3f})" for task in tasks if task.is_outlier]
    if outliers:
        out.line()
        out.line(f"far from every other task (nearest task, distance): {', '.join(outliers)}")
    for reason, names in grouped((entry.reason, entry.task) for entry in found.left_out).items():
        out.note(f"skipped {some(names)}: {reason}")
    if any(entry.is_damaged for entry in found.left_out):
        out.hint("run `icm vectors --again TASK` to extract the vectors of a task again")
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
        ("shown on the map", f"{human_percent(across + up)} of the variation"),
    ]


def _judged(silhouette: float | None) -> str:
    if silhouette is None:
        return "-"
    word = next((word for least, word in _WORDS if silhouette > least), "no substantial")
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
