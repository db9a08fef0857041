"""`icm rm`: remove tasks."""

from __future__ import annotations

from icm_cli.command import Call, command
from icm_cli.options import YesOpt
from icm_cli.session import Session
from icmlora.fleet.params import DryRun
from icmlora.fleet.tasks.editing import RemoveReport, plan_removal, remove_tasks
from icmlora.io.text import counted, human_size


@command(remove_tasks, without=("last_copies",))
def rm(session: Session, call: Call[RemoveReport], dry_run: DryRun = False, yes: YesOpt = False) -> None:
    out, planned = session.out, plan_removal(session.context, call["tasks"])
    for task in planned:
        versions = f"{counted(task.versions, 'version')}, " if task.versions > 1 else ""
        last = "; the code is the only copy, because the original was evicted" if task.is_last_copy else ""
        lost = f"; {counted(task.placeholders, 'placeholder')} could not be restored" if task.placeholders else ""
        adapters = counted(task.adapters, "adapter")
        out.note(f"{task.name}: {versions}{adapters}, {human_size(task.size)}{last}{lost}")
    names = [task.name for task in planned]
    last_copies = [task.name for task in planned if task.is_last_copy]
    lost = f", including the only copies of {len(last_copies)}" if last_copies else ""
    lost += "; placeholders in your folders could not be restored" if any(task.placeholders for task in planned) else ""
    question = f"Remove {counted(len(names), 'task')}{lost}?"
    is_removed, freed = not dry_run and out.confirm(question, yes=yes), None
    if is_removed:
        freed = call.now(tasks=names, last_copies=last_copies).freed
    out.document(
        {
            "removed": names if is_removed else [],
            "would_remove": [] if is_removed else names,
            "last_copies": last_copies,
            "placeholders": [task.name for task in planned if task.placeholders],
            "freed": freed,
        }
    )
    if not is_removed:
        out.note("removed nothing")
        return
    out.line(f"removed {counted(len(names), 'task')}" + ("" if freed is None else f", freed {human_size(freed)}"))
    if freed is None:
        out.note("the next `icm prune` frees the space: another process uses the store")
