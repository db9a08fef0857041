"""`icm import`: take the codes of a bundle into the store."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from icm_cli.options import BundleArg, DryRunOpt
from icm_cli.session import Session, command
from icmlora.io.text import counted

if TYPE_CHECKING:
    from icmlora.fleet.bundles import Imported


class ImportConflict(StrEnum):
    """What happens to a task whose name is taken."""

    SKIP = "skip"
    FAIL = "fail"


NamesArg = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[TASK]...", help="Tasks of the bundle, as `icm ls --from FILE` lists them; all if none is given."
    ),
]
OnConflictOpt = Annotated[
    ImportConflict,
    typer.Option("--on-conflict", help="A task of that name has another adapter, or another code: what to do."),
]


@command
def import_(
    session: Session,
    file: BundleArg,
    tasks: NamesArg = None,
    on_conflict: OnConflictOpt = ImportConflict.FAIL,
    dry_run: DryRunOpt = False,
) -> None:
    """Take a bundle's generator, codes and tasks into the store, which is made if there is none.

    The tasks have no original here: their adapters come from the codes. A task that is there with the same original
    gets its code. If the store uses another generator for the base model, nothing is taken. The same again changes
    nothing.

    Example:
      icm import fleet.icm
    """
    from icmlora.fleet.bundles import ImportRequest, take_in

    request = ImportRequest(file, tuple(tasks or ()), on_conflict.value, dry_run)
    _tell(session, session.follow(take_in(session.context, request), "import"), dry_run=dry_run)


def _tell(session: Session, done: Imported, *, dry_run: bool) -> None:
    out, generator = session.out, done.index.generator
    out.document(
        {
            "dry_run": dry_run,
            "bundle": done.digest,
            "base_model": done.index.base_model,
            "generator": generator.blob,
            "tasks": [{"task": task.name, "status": task.status} for task in done.tasks],
        }
    )
    statuses = [task.status for task in done.tasks]
    new, known = statuses.count("added") + statuses.count("encoded"), statuses.count("known")
    if out.is_quiet:
        for task in done.tasks:
            if task.status in ("added", "encoded"):
                out.answer(task.name)
    verb = "would import" if dry_run else "imported"
    out.line(f"{verb} {counted(new, 'code')} of {done.index.base_model}, {known} known")
    for task in done.tasks:
        out.detail(f"{task.name}: {task.status}")
    skipped = [task.name for task in done.tasks if task.status == "skipped"]
    if skipped:
        out.warn(f"skipped, another adapter or code of that name is in the store: {', '.join(skipped)}")
