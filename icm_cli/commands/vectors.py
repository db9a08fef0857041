"""`icm vectors`: extract the task vectors that are missing."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Annotated

from icm_cli.failures import print_skipped, print_vectors_event
from icm_cli.options import DeviceOpt, ShardOpt, SomeTasksArg, WorkersOpt, option
from icm_cli.session import Session, command, end
from icmlora.io.text import counted

if TYPE_CHECKING:
    from icmlora.fleet.vectors.vectors import VectorReport

AgainOpt = Annotated[bool, option("--again", "Also extract the vectors of tasks that already have some.")]


@command
def vectors(
    session: Session,
    tasks: SomeTasksArg = None,
    device: DeviceOpt = None,
    again: AgainOpt = False,
    workers: WorkersOpt = None,
    shard: ShardOpt = None,
) -> None:
    """Extract task vectors: the base model's hidden states on samples of each task, with and without its adapter.

    `icm ingest` does this already if the base model is on this machine. For a task without samples, bundled probe
    texts are used. A task that fails is named, and the others go on; the exit code is then 3.

    Example:
      icm vectors
    """
    from icmlora.fleet.vectors.vectors import extract_vectors

    report, stopped = session.run(
        "vectors",
        lambda context: extract_vectors(
            context, tasks or (), device=session.device(device), again=again, workers=workers, shard=shard
        ),
        partial(print_vectors_event, session),
    )
    _tell_end(session, report)
    partly = print_skipped(session.out, report.left_out, "no vectors")
    done = f"{counted(len(report.tasks), 'task')} extracted"
    end(done, stopped=stopped, partly=partly or bool(report.failed), hint="run `icm vectors` to continue")


def _tell_end(session: Session, report: VectorReport) -> None:
    out = session.out
    failed = [failure.task for failure in report.failed]
    out.event("summary", extracted=len(report.tasks), present=report.present, failed=failed)
    out.line(f"extracted the vectors of {counted(len(report.tasks), 'task')}; {report.present} already had vectors")
    for note in report.notes:
        out.note(note)
    if failed:
        out.note(f"without vectors, see the warnings above: {', '.join(failed)}")
    if report.evicted:
        out.note(f"skipped, because the original was evicted: {', '.join(report.evicted)}")
    if report.original_only:
        out.note(f"skipped, because only the original is kept: {', '.join(report.original_only)}")
    if report.changed:
        out.note(f"not stored, because the task changed in the meantime: {', '.join(report.changed)}")
