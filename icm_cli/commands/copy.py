"""`icm copy`: copy tasks from one store to another."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import typer

from icm_cli.command import plain_command
from icm_cli.errors import ExitCode
from icm_cli.session import Session
from icmlora.fleet.context import address_of
from icmlora.fleet.params import Param, Tasks
from icmlora.fleet.tasks.copies import copy_tasks
from icmlora.io.text import counted, human_size


@plain_command
def copy(
    session: Session,
    source: Annotated[str, Param("Store to copy from: a folder, or postgresql://HOST/DATABASE.", "STORE1")],
    target: Annotated[str, Param("Store to copy to. A missing folder is created.", "STORE2")],
    tasks: Tasks = (),
) -> None:
    """Copy tasks from one store to another.

    Copies originals, texts, vectors, codes and measurements, and the generators of the base models. Every
    file is read back to verify it. Existing data in STORE2 is never changed or deleted. If STORE2 has the same adapter,
    only missing data is added. If it has another adapter under this name, the task is skipped and the exit code is 3.

    Run the same command again to resume an interrupted copy or to update a backup.

    Example:
      icm copy ~/.local/share/icm /mnt/backup/icm
    """
    with session.working("copy") as context:
        done = copy_tasks(replace(context, address=address_of(source)), target, tasks)
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
