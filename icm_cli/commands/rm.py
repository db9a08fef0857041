"""`icm rm`: remove tasks."""

from __future__ import annotations

from icm_cli.options import DryRunOpt, TasksArg, YesOpt
from icm_cli.session import Session, command
from icmlora.io.text import counted, human_size


@command
def rm(session: Session, tasks: TasksArg, dry_run: DryRunOpt = False, yes: YesOpt = False) -> None:
    """Remove tasks with their adapters, vectors, codes and measurements.

    If any name is unknown, nothing is removed. `icm prune` frees the space. Removing an evicted task removes the last
    copy of its adapter, and its placeholders can no longer be restored.

    Example:
      icm rm shakespeare --dry-run
    """
    from icmlora.fleet.tasks.tasks import plan_removal, remove_tasks

    out, context = session.out, session.context
    planned = plan_removal(context, tasks)
    for task in planned:
        last = "; the code is the only copy, because the original was evicted" if task.is_last_copy else ""
        lost = f"; {counted(task.placeholders, 'placeholder')} could not be restored" if task.placeholders else ""
        out.note(f"{task.name}: {counted(task.adapters, 'adapter')}, {human_size(task.size)}{last}{lost}")
    names = [task.name for task in planned]
    last_copies = [task.name for task in planned if task.is_last_copy]
    lost = f", including the only copies of {len(last_copies)}" if last_copies else ""
    lost += "; placeholders in your folders could not be restored" if any(task.placeholders for task in planned) else ""
    question = f"Remove {counted(len(names), 'task')}{lost}?"
    removed = False
    if not dry_run and out.confirm(question, yes=yes):
        remove_tasks(context, names, last_copies=last_copies)
        removed = True
    out.document(
        {
            "removed": names if removed else [],
            "would_remove": [] if removed else names,
            "last_copies": last_copies,
            "placeholders": [task.name for task in planned if task.placeholders],
        }
    )
    if removed:
        out.line(f"removed {counted(len(names), 'task')}")
        out.hint("run `icm prune --empty-quarantine` to free the space")
    else:
        out.note("removed nothing")
