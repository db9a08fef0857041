"""`icm vectors`: extract the task vectors that are missing."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from icm_cli.errors import Interrupted
from icm_cli.options import DeviceOpt, SomeTasksArg
from icm_cli.session import Session, command
from icmlora.io.text import counted

if TYPE_CHECKING:
    from icmlora.fleet.context import Event
    from icmlora.fleet.vectors import VectorReport

AgainOpt = Annotated[bool, typer.Option("--again", help="Also for tasks that have their vectors.")]


@command
def vectors(session: Session, tasks: SomeTasksArg = None, device: DeviceOpt = None, again: AgainOpt = False) -> None:
    """Extract task vectors: what the base model makes of each task's samples, with and without its adapter.

    `icm ingest` does it where it finds the base model. A task without samples is read through bundled probe texts.

    Example:
      icm vectors
    """
    from icmlora.fleet.vectors import extract_missing

    with session.stoppable() as stop:
        work = extract_missing(session.context, tasks or [], device=session.device(device), again=again, stop=stop)
        report = session.follow(work, "vectors", partial(tell, session))
    session.out.event("summary", extracted=len(report.tasks), present=report.present)
    session.out.line(f"extracted the vectors of {counted(len(report.tasks), 'task')}; {report.present} had theirs")
    if report.evicted:
        session.out.note(f"evicted, so there is no adapter to look through: {', '.join(report.evicted)}")
    if report.changed:
        names = ", ".join(report.changed)
        session.out.note(f"changed by another icm meanwhile, so their vectors were not stored: {names}")
    check_finished(report)


def tell(session: Session, event: Event) -> None:
    """Report one task whose vectors are stored."""
    from icmlora.fleet.vectors import Extracted

    if isinstance(event, Extracted):
        session.out.event("vectors", **asdict(event))
        session.out.detail(f"{event.task}: {event.vectors} vectors from its {event.source}")


def check_finished(report: VectorReport) -> None:
    """Raise if the user stopped the extraction.

    Raises:
        Interrupted: It was stopped.
    """
    if report.stopped:
        done = counted(len(report.tasks), "task")
        raise Interrupted(f"interrupted; {done} extracted", hint="`icm vectors` goes on with the others")
