"""`icm note`: keep a note with a task."""

from __future__ import annotations

from typing import Annotated

import typer

from icm_cli.errors import UsageProblem
from icm_cli.options import TaskArg
from icm_cli.session import Session, command

TextArg = Annotated[
    str | None,
    typer.Argument(metavar="[TEXT]", help="The note; it replaces an earlier one.", show_default=False),
]
ClearOpt = Annotated[bool, typer.Option("--clear", help="Remove the note.")]


@command
def note(session: Session, task: TaskArg, text: TextArg = None, clear: ClearOpt = False) -> None:
    """Keep a note with a task. Without TEXT, print it.

    Example:
      icm note poems "for the spring demo; rank 8 was enough"
    """
    from icmlora.fleet.tasks.tasks import set_note, show_task

    out, context = session.out, session.context
    if text is not None and clear:
        raise UsageProblem("a note is either given or cleared", hint="leave out TEXT or --clear")
    changes = text is not None or clear
    done = set_note(context, task, text) if changes else show_task(context, task).task
    out.document({"task": done.name, "note": done.note})
    if done.note is not None and not changes:
        out.answer(done.note)
    elif done.note is None:
        out.note(f"{done.name} has no note")
    else:
        out.note(f"{done.name} has this note now")
