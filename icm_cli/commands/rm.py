"""`icm rm`: forget tasks."""

from __future__ import annotations

from icm_cli.options import DryRunOpt, TasksArg, YesOpt
from icm_cli.session import Session, command
from icmlora.io.text import counted, human_size


@command
def rm(session: Session, tasks: TasksArg, dry_run: DryRunOpt = False, yes: YesOpt = False) -> None:
    """Forget tasks with their adapters, vectors, codes and measurements.

    The bytes stay until `icm prune`. All names are looked up before anything is forgotten. Of an evicted task
    the code is the only copy, and it goes too.

    Example:
      icm rm shakespeare --dry-run
    """
    from icmlora.fleet.admin import plan_removal, remove_tasks

    out = session.out
    doomed = plan_removal(session.context, tasks)
    for task in doomed:
        last = "; its original was evicted, its code is the only copy" if task.is_last_copy else ""
        out.note(f"{task.name}: {counted(task.adapters, 'adapter')}, {human_size(task.size)}{last}")
    names = [task.name for task in doomed]
    last_copies = [task.name for task in doomed if task.is_last_copy]
    question = f"Forget {counted(len(names), 'task')}?"
    if last_copies:
        question = (
            f"Forget {counted(len(names), 'task')}, of which the codes of {len(last_copies)} are the only copies?"
        )
    removed = False
    if not dry_run and out.confirm(question, yes=yes):
        remove_tasks(session.context, names, last_copies=last_copies)
        removed = True
    out.document(
        {
            "removed": names if removed else [],
            "would_remove": [] if removed else names,
            "last_copies": last_copies,
        }
    )
    if removed:
        out.line(f"forgot {counted(len(names), 'task')}")
        out.hint("`icm prune` frees the bytes that nothing else needs")
    else:
        out.note("nothing was forgotten")
