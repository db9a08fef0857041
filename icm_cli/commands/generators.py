"""`icm generators`: which there are, what depends on each, and going back to an earlier one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from icm_cli.options import DryRunOpt, YesOpt
from icm_cli.output import Column
from icm_cli.session import Session, command
from icmlora.io.text import counted, human_size

if TYPE_CHECKING:
    from icmlora.fleet.generators import Version

DigestArg = Annotated[
    str, typer.Argument(metavar="DIGEST", help="The first digits of a generator, as `icm generators` lists it.")
]

_SHORT = 12
_COLUMNS = (
    Column("generator"),
    Column("base model", shrink=True),
    Column("version", right=True),
    Column("created"),
    Column("epochs", right=True),
    Column("size", right=True),
    Column("start", right=True),
    Column("tasks", right=True),
    Column("evicted, here alone", right=True),
    Column("in use"),
)

generators = typer.Typer(name="generators", invoke_without_command=True)


@generators.callback()
@command
def ls(session: Session) -> None:
    """List generators, what depends on each, and which one is in use; subcommands go back to one or forget one.

    EPOCHS grow with `icm train --update`; a file decodes the codes of all its epochs. EVICTED, HERE ALONE counts tasks
    whose original is gone and that no other generator gives back as they were checked. START is what `icm generate`
    begins with.

    Example:
      icm generators
    """
    from icmlora.fleet.generators import versions

    found = versions(session.context)
    session.out.document([_as_json(version) for version in found])
    if session.out.is_quiet:
        for version in found:
            session.out.answer(version.use.generator.blob)
    session.out.table(_COLUMNS, [_cells(version) for version in found])
    if not found:
        session.out.hint("`icm train` makes the first generator")


@generators.command()
@command
def rollback(session: Session, digest: DigestArg) -> None:
    """Make an earlier generator (or again a later one) the one in use; nothing is deleted.

    Tasks that got their code later have none then. It is refused where an evicted task would not come back as it was
    checked.

    Example:
      icm generators rollback 3f9a12c4
    """
    from icmlora.fleet.generators import roll_back

    switched = roll_back(session.context, digest)
    made, out = switched.generator, session.out
    out.document(
        {
            "generator": made.blob,
            "base_model": made.base_model,
            "version": made.version,
            "without_code": switched.without_code,
        }
    )
    out.line(f"generator {made.version} of {made.base_model} is in use")
    if switched.without_code:
        out.note(f"without a code under it: {', '.join(switched.without_code)}")
        out.hint("`icm train --update` gives them one; `icm generators` lists which to roll forward to instead")


@generators.command()
@command
def forget(session: Session, digest: DigestArg, dry_run: DryRunOpt = False, yes: YesOpt = False) -> None:
    """Forget a generator that is not in use, with its codes and what was measured of them.

    The bytes stay until `icm prune`. It is refused where an evicted task has its only code there.

    Example:
      icm generators forget 3f9a12c4 --dry-run
    """
    from icmlora.fleet import generators as work

    out, plan = session.out, work.plan_forgetting(session.context, digest)
    made = plan.generator
    what = f"generator {made.version} of {made.base_model} with {counted(plan.codes, 'code')}"
    forgotten = not dry_run and out.confirm(f"Forget {what}?", yes=yes)
    if forgotten:
        work.forget(session.context, made)
    out.document(
        {
            "forgotten": forgotten,
            "generator": made.blob,
            "base_model": made.base_model,
            "version": made.version,
            "codes": plan.codes,
        }
    )
    if forgotten:
        out.line(f"forgot {what}")
        out.hint("`icm prune` frees the bytes that nothing else needs")
    else:
        out.note(f"nothing was forgotten; it would be {what}")


def _cells(version: Version) -> list[str]:
    made, use = version.use.generator, version.use
    return [
        made.blob[:_SHORT],
        made.base_model,
        str(made.version),
        made.created_at,
        "damaged" if version.epochs is None else str(version.epochs),
        human_size(made.size),
        human_size(made.start_size) if made.start else "-",
        str(len(use.tasks)),
        str(len(use.last_copies)),
        "yes" if made.is_current else "",
    ]


def _as_json(version: Version) -> dict[str, object]:
    made, use = version.use.generator, version.use
    return {
        "generator": made.blob,
        "base_model": made.base_model,
        "version": made.version,
        "created_at": made.created_at,
        "epochs": version.epochs,
        "size": made.size,
        "start": made.start,
        "start_size": made.start_size,
        "tasks": use.tasks,
        "last_copies": use.last_copies,
        "is_current": made.is_current,
    }
