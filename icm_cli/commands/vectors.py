"""`icm vectors`: extract missing task vectors."""

from __future__ import annotations

from typing import TYPE_CHECKING

from icm_cli.command import Call, command
from icm_cli.report import end, print_report
from icm_cli.session import Session
from icmlora.fleet.vectors.vectors import ExtractionTakesLong, VectorReport, VectorsExtracted, extract_vectors
from icmlora.io.text import counted

if TYPE_CHECKING:
    from icmlora.fleet.context import Event


@command(extract_vectors)
def vectors(session: Session, call: Call[VectorReport]) -> None:
    report = call.run(lambda event: print_vectors_detail(session, event), "vectors")
    extracted = counted(len(report.done), "task")
    print_report(
        session,
        report,
        summary={
            "extracted": len(report.done),
            "present": report.present,
            "failed": [failure.task for failure in report.failed],
        },
        line=f"extracted the vectors of {extracted}; {report.present} already had vectors",
        missing="no vectors",
    )
    if report.changed:
        session.out.note(f"not stored because the task changed during extraction: {', '.join(report.changed)}")
    end(report, f"extracted the vectors of {extracted}", hint="run `icm vectors` to continue")


def print_vectors_detail(session: Session, event: Event) -> None:
    """Print an estimate of the remaining time, and details of each task."""
    if isinstance(event, ExtractionTakesLong):
        minutes = round(event.seconds / 60)
        time = counted(minutes, "minute") if minutes < 100 else counted(round(minutes / 60), "hour")
        session.out.note(f"extracting the task vectors of {counted(event.tasks, 'more task')} takes about {time}")
        kept = "adapters and finished vectors are kept, and `icm vectors` extracts the rest later"
        session.out.hint(f"press Ctrl-C to stop: {kept}; `icm ingest --no-vectors` skips this step")
    if isinstance(event, VectorsExtracted):
        source = "its samples" if event.source == "samples" else "probe texts"
        session.out.detail(f"{event.task}: {event.vectors} vectors from {source}")
        if event.skipped is not None:
            session.out.detail(f"{event.task}: {event.skipped}")
