"""`icm generators`: list generators, and make an earlier one current."""

from __future__ import annotations

import typer

from icm_cli.command import Call, command
from icm_cli.output import Field
from icm_cli.session import Session
from icmlora.fleet.tasks import generators as use_cases
from icmlora.fleet.tasks.generators import GeneratorVersion, RolledBack
from icmlora.io.text import counted, human_size

_SHORT = 12
_FIELDS: tuple[Field[GeneratorVersion], ...] = (
    Field("generator", lambda version: version.generator.blob[:_SHORT]),
    Field("base model", lambda version: version.generator.base_model, shrink=True),
    Field("version", lambda version: str(version.generator.version), right=True),
    Field("created", lambda version: version.generator.created_at),
    Field("networks", lambda version: "damaged" if version.networks is None else str(version.networks), right=True),
    Field("size", lambda version: human_size(version.generator.size), right=True),
    Field(
        "few-shot start",
        lambda version: "-" if version.generator.start is None else human_size(version.generator.start_size),
        right=True,
    ),
    Field("needed by", lambda version: counted(len(version.tasks), "task"), right=True),
    Field("in use", lambda version: "yes" if version.is_current else ""),
)

generators = typer.Typer(name="generators", invoke_without_command=True)


@generators.callback()
@command(use_cases.list_generators)
def ls(session: Session, call: Call[list[GeneratorVersion]]) -> None:
    found, out = call.now(), session.out
    out.document([_as_json(version) for version in found])
    out.names(version.generator.blob for version in found)
    out.listing(_FIELDS, found)
    if not found:
        out.hint("run `icm train` to train the first generator")
    for version in found:
        if not version.tasks and not version.is_current:
            out.note(f"no task needs generator {version.generator.blob[:_SHORT]}; `icm prune` deletes it")


@generators.command()
@command(use_cases.rollback)
def rollback(session: Session, call: Call[RolledBack]) -> None:
    done, out = call.now(), session.out
    generator = done.generator
    out.document(
        {
            "generator": generator.blob,
            "base_model": generator.base_model,
            "version": generator.version,
            "others": list(done.others),
        }
    )
    out.line(
        f"generator {generator.blob[:_SHORT]} of {generator.base_model} is now in use as version {generator.version}"
    )
    if done.others:
        out.note(f"{counted(len(done.others), 'task')} keep the codes of other generators")
        out.hint("run `icm encode` to encode them with this one")


def _as_json(version: GeneratorVersion) -> dict[str, object]:
    generator = version.generator
    return {
        "generator": generator.blob,
        "base_model": generator.base_model,
        "version": generator.version,
        "created_at": generator.created_at,
        "epochs": version.networks,
        "size": generator.size,
        "start": generator.start,
        "start_size": generator.start_size,
        "tasks": list(version.tasks),
        "is_current": version.is_current,
    }
