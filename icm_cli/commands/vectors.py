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

AgainOpt = Annotated[bool, typer.Option("--again", help="Also extract the vectors of tasks that already have some.")]


@command
def vectors(session: Session, tasks: SomeTasksArg = None, device: DeviceOpt = None, again: AgainOpt = False) -> None:
    """Extract task vectors: the base model's hidden states on samples of each task, with and without its adapter.

    `icm ingest` does this already if the base model is on this machine. For a task without samples, bundled probe
    texts are used.

    Example:
      icm vectors
    """
    report, stopped = session.run(
        "vectors",
        lambda fleet: fleet.extract_vectors(tasks or (), device=session.device(device), again=again),
        partial(tell_vectors, session),
    )
    _tell_end(session, report)
    if stopped:
        done = counted(len(report.tasks), "task")
        raise Interrupted(f"interrupted; {done} extracted", hint="run `icm vectors` to continue")


def tell_vectors(session: Session, event: Event) -> None:
    """Report one task whose vectors are stored."""
    from icmlora.fleet.vectors import VectorsExtracted

    if isinstance(event, VectorsExtracted):
        session.out.event("vectors", **asdict(event))
        source = "its samples" if event.source == "samples" else "probe texts"
        session.out.detail(f"{event.task}: {event.vectors} vectors from {source}")


def _tell_end(session: Session, report: VectorReport) -> None:
    out = session.out
    out.event("summary", extracted=len(report.tasks), present=report.present)
    out.line(f"extracted the vectors of {counted(len(report.tasks), 'task')}; {report.present} already had vectors")
    if report.evicted:
        out.note(f"skipped, because the original was evicted: {', '.join(report.evicted)}")
    if report.changed:
        out.note(f"not stored, because the task changed in the meantime: {', '.join(report.changed)}")
