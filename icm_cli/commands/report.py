"""`icm report`: write an HTML report about the store."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from icm_cli.command import Call, command
from icm_cli.errors import ExitCode
from icm_cli.report import print_skipped
from icm_cli.session import Session
from icm_cli.text import groups_json
from icmlora.fleet.report.report import write_report
from icmlora.io.text import counted, human_size

if TYPE_CHECKING:
    from icmlora.fleet.report.pictures import Distances, TaskPictures
    from icmlora.fleet.report.summary import ReportSummary


@command(write_report)
def report(session: Session, call: Call[ReportSummary]) -> None:
    done = call.run(label="report")
    if not _print_result(session, done):
        raise typer.Exit(ExitCode.PARTLY)


def _print_result(session: Session, done: ReportSummary) -> bool:
    """Print the result. Return whether the report is complete."""
    out = session.out
    out.document(
        {
            "output": str(done.file),
            "size": done.size,
            "tasks_count": done.tasks,
            "maps": done.maps,
            "quality": done.quality,
            "outputs": done.outputs,
            "pictures": [_pictures_json(found) for found in done.pictures],
            "failed": [{"task": task, "reason": reason} for task, reason in done.failures.items()],
        }
    )
    out.names([str(done.file)])
    out.line(f"wrote {done.file}: {counted(done.tasks, 'task')}, {human_size(done.size)}")
    for found in done.pictures:
        if found.distances is not None:
            out.line(f"{found.task}, image distance: {_distances_text(found.distances)}")
    for group in done.skipped:
        print_skipped(session, group, "no outputs")
    return not (done.failed or done.skipped)


def _distances_text(distances: Distances) -> str:
    parts = [f"{source} to original {distance:.3f}" for source, distance in distances.to_original.items()]
    return ", ".join(parts if distances.seeds is None else [*parts, f"between seeds {distances.seeds:.3f}"])


def _pictures_json(found: TaskPictures) -> dict[str, object]:
    distances = found.distances
    return {
        "task": found.task,
        "sources": list(found.sources),
        "prompts": [drawn.prompt for drawn in found.prompts],
        "to_original": None if distances is None else dict(distances.to_original),
        "between_seeds": None if distances is None else distances.seeds,
        "errors": groups_json(found.errors),
        "notes": list(found.notes),
    }
