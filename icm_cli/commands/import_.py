"""`icm import`: add the codes of a bundle to the store."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import typer

from icm_cli.command import plain_command as command
from icm_cli.errors import ExitCode
from icm_cli.options import BundleArg, DryRunOpt, argument, option
from icm_cli.session import Session
from icmlora.io.text import counted

if TYPE_CHECKING:
    from icmlora.fleet.bundles.import_ import ImportReport


NamesArg = Annotated[
    list[str] | None, argument("[TASK]...", "Tasks of the bundle, as listed by `icm ls --from FILE`. Default: all.")
]
OnConflictOpt = Annotated[
    Literal["skip", "fail"],
    option("--on-conflict", "What to do if a stored task of this name has a different adapter or code."),
]


@command
def import_(
    session: Session,
    file: BundleArg,
    tasks: NamesArg = None,
    on_conflict: OnConflictOpt = "fail",
    dry_run: DryRunOpt = False,
) -> None:
    """Add the generator, codes and tasks of a bundle to the store.

    A bundle contains no originals, so adapters of new tasks are decoded from their codes. A stored task with the same
    original gets the code. The generator of the bundle is added to the store; it is used for new codes only if
    the base model had none. Tasks whose adapter cannot be written are skipped, and the exit code is 3. Repeated imports
    change nothing.

    Example:
      icm import fleet.icm
    """
    from icmlora.fleet.bundles.import_ import import_bundle

    with session.working("import") as context:
        done = import_bundle(context, file, tasks or (), on_conflict=on_conflict, dry_run=dry_run)
    _print_report(session, done, dry_run=dry_run)
    if done.refused:
        raise typer.Exit(ExitCode.PARTLY)


def _print_report(session: Session, done: ImportReport, *, dry_run: bool) -> None:
    out, generator = session.out, done.index.generator
    out.document(
        {
            "dry_run": dry_run,
            "bundle": done.digest,
            "base_model": done.index.base_model,
            "generator": generator.blob,
            "tasks": [{"task": task.name, "status": task.status} for task in done.tasks],
            "refused": dict(done.refused),
        }
    )
    statuses = [task.status for task in done.tasks]
    new, unchanged = statuses.count("added") + statuses.count("encoded"), statuses.count("known")
    out.names(task.name for task in done.tasks if task.status in ("added", "encoded"))
    verb = "would import" if dry_run else "imported"
    out.line(f"{verb} {counted(new, 'code')} of {done.index.base_model}; {unchanged} unchanged")
    for task in done.tasks:
        out.detail(f"{task.name}: {task.status}")
    skipped = [task.name for task in done.tasks if task.status == "skipped"]
    if skipped:
        out.warn(f"skipped tasks with a different adapter or code in the store: {', '.join(skipped)}")
    for name, reason in done.refused.items():
        out.warn(f"skipped {name}: {reason}", task=name)
