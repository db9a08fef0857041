"""Print the report of a use case: JSON lines while it works, then a table, a summary, and the exit code."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import typer

from icm_cli.errors import ExitCode, Interrupted
from icm_cli.output import Field
from icm_cli.text import as_fields
from icmlora.fleet.context import TaskFailed
from icmlora.io.text import counted, some

if TYPE_CHECKING:
    from icm_cli.session import Session
    from icmlora.fleet.context import Event
    from icmlora.fleet.results import Report, Skipped

T = TypeVar("T")


def print_event(session: Session, event: Event) -> None:
    """Print an event: a JSON line if it has a type, and a warning if something failed."""
    from icmlora.fleet.failures import BaseModelFailed  # imports the kinds of base models

    if isinstance(event, TaskFailed | BaseModelFailed):
        subject = {"task": event.task} if isinstance(event, TaskFailed) else {"base_model": event.base_model}
        name = next(iter(subject.values()))
        session.out.warn(f"{name}: {event.message}", kind=event.kind, **subject, hint=event.hint)
        if event.hint is not None:
            session.out.hint(event.hint)
    elif event.TYPE:
        session.out.event(event.TYPE, **as_fields(event))


def print_report(
    session: Session,
    report: Report[T],
    fields: Sequence[Field[T]] = (),
    *,
    summary: dict[str, Any],
    line: str,
    missing: str = "not processed",
) -> None:
    """Print the result of a use case.

    Args:
        session: The command.
        report: Its results.
        fields: Columns of the table of `report.done`; no table if empty.
        summary: The fields of the last JSON line.
        line: The summary for people.
        missing: What skipped tasks lack, such as "no vectors".
    """
    out = session.out
    out.event("summary", **summary)
    if fields:
        out.listing(fields, report.done)
    out.line(line)
    for note in report.notes:
        out.note(note)
    if report.failed:
        out.note(f"failed (see the warnings above): {', '.join(failure.task for failure in report.failed)}")
    for group in report.skipped:
        print_skipped(session, group, missing)


def print_skipped(session: Session, group: Skipped, missing: str) -> None:
    """Print skipped tasks with their reason: a warning if the user asked for them."""
    out = session.out
    if group.base_model is None:
        text = f"skipped {some(group.tasks)}: {group.reason}"
    else:
        text = f"{missing} for {counted(len(group.tasks), 'task')} ({some(group.tasks)}): {group.reason}"
    fields = {"base_model": group.base_model, "tasks": list(group.tasks), "hint": group.hint}
    if group.is_problem:
        out.warn(text, kind=group.kind, **fields)
    else:
        out.event("left_out", kind=group.kind, reason=group.reason, **fields)
        out.note(text)
    if group.hint is not None:
        out.hint(group.hint)


def end(
    report: Report[Any],
    done: str,
    *,
    hint: str = "run the same command to continue",
    code: ExitCode = ExitCode.PARTLY,
) -> None:
    """Exit with a non-zero code if the user stopped the command or part of the work failed."""
    if report.stopped:
        raise Interrupted(f"interrupted; {done}", hint=hint)
    if report.is_partial:
        raise typer.Exit(code)
