"""`icm import`: take the codes of a bundle into the store."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import typer

from icm_cli.errors import ExitCode
from icm_cli.options import BundleArg, DryRunOpt, argument, option
from icm_cli.session import Session, command
from icmlora.io.text import counted

if TYPE_CHECKING:
    from icmlora.fleet.bundles.import_ import ImportReport


NamesArg = Annotated[
    list[str] | None, argument("[TASK]...", "Tasks of the bundle, as `icm ls --from FILE` lists them. Default: all.")
]
OnConflictOpt = Annotated[
    Literal["skip", "fail"],
    option("--on-conflict", "What to do if the store has a task of that name with another adapter or another code."),
]


@command
def import_(
    session: Session,
    file: BundleArg,
    tasks: NamesArg = None,
    on_conflict: OnConflictOpt = "fail",
    dry_run: DryRunOpt = False,
) -> None:
    """Take the generator, codes and tasks of a bundle into the store.

    A bundle has no originals: in this store the adapters come from the codes. A task that the store already has with
    the same original gets its code. If the store uses another generator for the base model, nothing is imported.
    A task whose adapter could not be written is left out; the exit code is then 3.
    Running the same command again changes nothing.

    Example:
      icm import fleet.icm
    """
    from icmlora.fleet.bundles.import_ import import_bundle

    with session.working("import") as context:
        done = import_bundle(context, file, tasks or (), on_conflict=on_conflict, dry_run=dry_run)
    _tell(session, done, dry_run=dry_run)
    if done.refused:
        raise typer.Exit(ExitCode.PARTLY)


def _tell(session: Session, done: ImportReport, *, dry_run: bool) -> None:
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
    new, known = statuses.count("added") + statuses.count("encoded"), statuses.count("known")
    out.names(task.name for task in done.tasks if task.status in ("added", "encoded"))
    verb = "would import" if dry_run else "imported"
    out.line(f"{verb} {counted(new, 'code')} of {done.index.base_model}, {known} known")
    for task in done.tasks:
        out.detail(f"{task.name}: {task.status}")
    skipped = [task.name for task in done.tasks if task.status == "skipped"]
    if skipped:
        out.warn(f"skipped, because the store has another adapter or code of that name: {', '.join(skipped)}")
    for name, reason in done.refused.items():
        out.warn(f"left out {name}: {reason}", task=name)
