"""`icm copy`: copy tasks from one store to another."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import typer

from icm_cli.errors import ExitCode
from icm_cli.options import SomeTasksArg, argument
from icm_cli.session import Session, command
from icmlora.io.text import counted, human_size

FromArg = Annotated[str, argument("STORE1", "Store to copy from: a folder, or postgresql://HOST/DATABASE.")]
ToArg = Annotated[str, argument("STORE2", "Store to copy to. A folder is made if there is none.")]


@command
def copy(session: Session, source: FromArg, target: ToArg, tasks: SomeTasksArg = None) -> None:
    """Copy tasks from one store to another, with everything that belongs to them.

    A task goes with its originals, texts, vectors, codes, residuals and measurements, and with the generators of its
    base model. Nothing in the second store is changed or deleted. A task that it has with another adapter is not
    copied; the exit code is then 3. One that it has with the same adapter gets what it lacks. Every file is read back.

    Run the same command again to go on after a stop, or to bring a backup up to date.

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
    parts += [f"{len(done.known)} known"] if done.known else []
    out.line("; ".join(parts))
    for name, reason in done.refused.items():
        out.warn(f"left out {name}: {reason}", task=name)
    if done.refused:
        raise typer.Exit(ExitCode.PARTLY)
