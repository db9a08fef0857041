"""`icm vectors`: extract missing task vectors."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Annotated

from icm_cli.failures import print_skipped, print_vectors_event
from icm_cli.options import DeviceOpt, ShardOpt, SomeTasksArg, WorkersOpt, option
from icm_cli.session import Session, command, end
from icmlora.io.text import counted

if TYPE_CHECKING:
    from icmlora.fleet.vectors.vectors import VectorReport

AgainOpt = Annotated[bool, option("--again", "Extract vectors again for tasks that already have them.")]


@command
def vectors(
    session: Session,
    tasks: SomeTasksArg = None,
    device: DeviceOpt = None,
    again: AgainOpt = False,
    workers: WorkersOpt = None,
    shard: ShardOpt = None,
) -> None:
    """Extract missing task vectors.

    A task vector holds the base model's hidden states on the task's samples, with and without its adapter. Tasks
    without samples use bundled probe texts. `icm ingest` already does this if the base model is on this machine. If
    any task fails, the exit code is 3.

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
    _print_end(session, report)
    partly = print_skipped(session.out, report.left_out, "no vectors")
    done = f"extracted the vectors of {counted(len(report.tasks), 'task')}"
    end(done, stopped=stopped, partly=partly or bool(report.failed), hint="run `icm vectors` to continue")


def _print_end(session: Session, report: VectorReport) -> None:
    out = session.out
    failed = [failure.task for failure in report.failed]
    out.event("summary", extracted=len(report.tasks), present=report.present, failed=failed)
    out.line(f"extracted the vectors of {counted(len(report.tasks), 'task')}; {report.present} already had vectors")
    for note in report.notes:
        out.note(note)
    if failed:
        out.note(f"failed (see the warnings above): {', '.join(failed)}")
    if report.evicted:
        out.note(f"skipped because the original was evicted: {', '.join(report.evicted)}")
    if report.original_only:
        out.note(f"skipped because the adapter cannot have a code: {', '.join(report.original_only)}")
    if report.changed:
        out.note(f"not stored because the task changed during extraction: {', '.join(report.changed)}")
