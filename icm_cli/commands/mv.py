"""`icm mv`: rename a task."""

from __future__ import annotations

from typing import Annotated

import typer

from icm_cli.options import TaskArg
from icm_cli.session import Session, command

NewNameArg = Annotated[str, typer.Argument(metavar="NEW", help="The name to give it.", show_default=False)]


@command
def mv(session: Session, task: TaskArg, new: NewNameArg) -> None:
    """Rename a task. Its adapters, vectors, codes and measurements stay with it.

    A name has letters and digits of any script, ".", "_" and "-". Bundles and folders from before keep the old name.

    Example:
      icm mv lora-final-v2 poems
    """
    from icmlora.fleet.tasks.tasks import rename_task

    done = rename_task(session.context, task, new)
    session.out.document({"old": task, "new": done.name})
    session.out.line(f"{task} is now {done.name}")
