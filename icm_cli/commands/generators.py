"""`icm generators`: list, roll back or delete generators."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from icm_cli.options import DryRunOpt, YesOpt, argument
from icm_cli.output import Field
from icm_cli.session import Session, command
from icmlora.io.text import counted, human_size

if TYPE_CHECKING:
    from icmlora.fleet.tasks.generators import GeneratorVersion

DigestArg = Annotated[str, argument("DIGEST", "First digits of a generator's digest, as listed by `icm generators`.")]

_SHORT = 12
_FIELDS: tuple[Field[GeneratorVersion], ...] = (
    Field("generator", lambda made: made.record.blob[:_SHORT]),
    Field("base model", lambda made: made.record.base_model, shrink=True),
    Field("version", lambda made: str(made.record.version), right=True),
    Field("created", lambda made: made.record.created_at),
    Field("networks", lambda made: _networks(made), right=True),
    Field("size", lambda made: human_size(made.record.size), right=True),
    Field("few-shot start", lambda made: human_size(made.record.start_size) if made.record.start else "-", right=True),
    Field("tasks", lambda made: str(len(made.tasks)), right=True),
    Field("only copies", lambda made: str(len(made.last_copies)), right=True),
    Field("in use", lambda made: "yes" if made.record.is_current else ""),
)

generators = typer.Typer(name="generators", invoke_without_command=True)


@generators.callback()
@command
def ls(session: Session) -> None:
    """List generators and the tasks that depend on them.

    NETWORKS counts the versions of the network in the file, because `icm train --update` may add one. FEW-SHOT START is
    the size of the data for `icm generate`. TASKS counts the tasks with a code. ONLY COPIES counts evicted tasks that
    no other generator can restore.


    Example:
      icm generators
    """
    from icmlora.fleet.tasks.generators import list_generators

    found = list_generators(session.context)
    session.out.document([_as_json(version) for version in found])
    session.out.names(version.record.blob for version in found)
    session.out.listing(_FIELDS, found)
    if not found:
        session.out.hint("run `icm train` to train the first generator")


@generators.command()
@command
def rollback(session: Session, digest: DigestArg) -> None:
    """Switch to an earlier or later generator.

    Nothing is deleted. Tasks encoded only with a newer generator have no code under the earlier one. The command fails
    if the switch would change the decoded adapter of an evicted task.

    Example:
      icm generators rollback 3f9a12c4
    """
    from icmlora.fleet.tasks.generators import rollback

    done, out = rollback(session.context, digest), session.out
    made = done.generator
    out.document(
        {
            "generator": made.blob,
            "base_model": made.base_model,
            "version": made.version,
            "without_code": done.without_code,
        }
    )
    out.line(f"generator {made.version} of {made.base_model} is now in use")
    if done.without_code:
        out.note(f"tasks without a code under it: {', '.join(done.without_code)}")
        out.hint("run `icm train --update` to encode them, or `icm generators` to choose another generator")


@generators.command()
@command
def forget(session: Session, digest: DigestArg, dry_run: DryRunOpt = False, yes: YesOpt = False) -> None:
    """Delete an unused generator with its codes and measurements.

    The command fails if it would delete the only code of an evicted task. If another icm process is running, the space
    is freed by the next `icm prune`.

    Example:
      icm generators forget 3f9a12c4 --dry-run
    """
    from icmlora.fleet.tasks.generators import forget_generator

    out, plan = session.out, forget_generator(session.context, digest, dry_run=True)
    made = plan.generator
    subject = f"generator {made.version} of {made.base_model} and {counted(plan.codes, 'code')}"
    forgotten = not dry_run and out.confirm(f"Delete {subject}?", yes=yes)
    if forgotten:
        forget_generator(session.context, made)
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
        out.line(f"deleted {subject}")
    else:
        out.note(f"would delete {subject}" if dry_run else "deleted nothing")


def _networks(version: GeneratorVersion) -> str:
    return "damaged" if version.networks is None else str(version.networks)


def _as_json(version: GeneratorVersion) -> dict[str, object]:
    made = version.record
    return {
        "generator": made.blob,
        "base_model": made.base_model,
        "version": made.version,
        "created_at": made.created_at,
        "epochs": version.networks,
        "size": made.size,
        "start": made.start,
        "start_size": made.start_size,
        "tasks": version.tasks,
        "last_copies": version.last_copies,
        "is_current": made.is_current,
    }
