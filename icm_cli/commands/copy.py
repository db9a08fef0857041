"""`icm copy`: copy tasks from one store to another."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import typer

from icm_cli.command import plain_command as command
from icm_cli.errors import ExitCode
from icm_cli.options import SomeTasksArg, argument
from icm_cli.session import Session
from icmlora.io.text import counted, human_size

FromArg = Annotated[str, argument("STORE1", "Store to copy from: a folder, or postgresql://HOST/DATABASE.")]
ToArg = Annotated[str, argument("STORE2", "Store to copy to. A missing folder is created.")]


@command
def copy(session: Session, source: FromArg, target: ToArg, tasks: SomeTasksArg = None) -> None:
    """Copy tasks from one store to another.

    Copies originals, texts, vectors, codes and measurements, and the generators of the base models. Every
    file is read back to verify it. Existing data in STORE2 is never changed or deleted. If STORE2 has the same adapter,
    only missing data is added. If it has another adapter under this name, the task is skipped and the exit code is 3.

    Run the same command again to resume an interrupted copy or to update a backup.

    Example:
      icm copy ~/.local/share/icm /mnt/backup/icm
    """
    from icmlora.fleet.context import address_of
    from icmlora.fleet.tasks.copies import copy_tasks

    with session.working("copy") as context:
        done = copy_tasks(replace(context, address=address_of(source)), target, tasks or ())
    out = session.out
    out.document(
        {
            "copied": done.copied,
            "completed": done.completed,
            "known": done.known,
            "refused": done.refused,
            "bytes": done.size,
        }
    )
    out.names([*done.copied, *done.completed])
    parts = [f"copied {counted(len(done.copied), 'task')}, {human_size(done.size)}"]
    parts += [f"{len(done.completed)} completed"] if done.completed else []
    parts += [f"{len(done.known)} unchanged"] if done.known else []
    out.line("; ".join(parts))
    for name, reason in done.refused.items():
        out.warn(f"skipped {name}: {reason}", task=name)

    if done.refused:
        raise typer.Exit(ExitCode.PARTLY)
