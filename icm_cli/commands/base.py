"""`icm base`: add, list and forget the places of base models on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from icm_cli.options import completing
from icm_cli.output import Column
from icm_cli.session import Session, command

NameArg = Annotated[
    str,
    typer.Argument(
        metavar="NAME", help="Name of the base model, as adapters give it.", autocompletion=completing("base")
    ),
]
PathArg = Annotated[
    Path, typer.Argument(metavar="PATH", help="A Hugging Face model folder or a .gguf file.", show_default=False)
]

_COLUMNS = (Column("base model"), Column("tasks", right=True), Column("path", shrink=True))


@command
def add(session: Session, name: NameArg, path: PathArg) -> None:
    """Tell icm where the base model NAME is. This path is preferred to the Hugging Face cache.

    Example:
      icm base add HuggingFaceTB/SmolLM2-135M-Instruct ./smollm2
    """
    recorded = session.fleet.add_base_model(name, path)
    session.out.document({"name": name, "path": str(recorded)})
    session.out.line(f"{name} is at {recorded}")


@command
def ls(session: Session) -> None:
    """List the base models of the store and where each one is on this machine.

    Example:
      icm base ls
    """
    bases = session.fleet.base_models()
    session.out.document(
        [
            {
                "name": base.record.name,
                "tasks_count": base.record.tasks,
                "path": None if base.path is None else str(base.path),
                "alias": base.record.path,
                "fingerprint": base.record.fingerprint,
                "problem": base.problem,
            }
            for base in bases
        ]
    )
    if session.out.is_quiet:
        for base in bases:
            session.out.answer(base.record.name)
    rows = [[base.record.name, str(base.record.tasks), str(base.path or "not found")] for base in bases]
    session.out.table(_COLUMNS, rows)
    if any(base.path is None for base in bases):
        session.out.hint("run `icm base add NAME PATH` to tell icm where a base model is")


@command
def rm(session: Session, name: NameArg) -> None:
    """Forget where the base model NAME is. Its adapters and files stay.

    Example:
      icm base rm HuggingFaceTB/SmolLM2-135M-Instruct
    """
    session.fleet.forget_base_model(name)
    session.out.document({"name": name, "path": None})
    session.out.line(f"forgot where {name} is")


base = typer.Typer(
    name="base", help="List base models, and tell icm where they are on this machine.", no_args_is_help=True
)
base.command()(add)
base.command()(ls)
base.command()(rm)
