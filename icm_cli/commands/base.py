"""`icm base`: where base models are on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from icm_cli.completion import complete_base
from icm_cli.output import Column
from icm_cli.session import Session, command

NameArg = Annotated[
    str,
    typer.Argument(metavar="NAME", help="The name that adapters give the base model.", autocompletion=complete_base),
]
PathArg = Annotated[
    Path, typer.Argument(metavar="PATH", help="A Hugging Face model folder or a .gguf file.", show_default=False)
]

_COLUMNS = (Column("base model"), Column("tasks", right=True), Column("path", shrink=True))


@command
def add(session: Session, name: NameArg, path: PathArg) -> None:
    """Say where the base model NAME is; it comes before the Hugging Face cache.

    Example:
      icm base add HuggingFaceTB/SmolLM2-135M-Instruct ./smollm2
    """
    from icmlora.fleet.admin import add_base

    recorded = add_base(session.context, name, path)
    session.out.document({"name": name, "path": str(recorded)})
    session.out.line(f"{name} is at {recorded}")


@command
def ls(session: Session) -> None:
    """List the base models that adapters name or that were added, and where each one is.

    Example:
      icm base ls
    """
    from icmlora.fleet.admin import known_bases

    bases = known_bases(session.context)
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
        session.out.hint("`icm base add NAME PATH` says where a base model is")


@command
def rm(session: Session, name: NameArg) -> None:
    """Forget where the base model NAME is; adapters and files stay.

    Example:
      icm base rm HuggingFaceTB/SmolLM2-135M-Instruct
    """
    from icmlora.fleet.admin import forget_base

    forget_base(session.context, name)
    session.out.document({"name": name, "path": None})
    session.out.line(f"forgot where {name} is")


base = typer.Typer(name="base", help="Say where base models are on this machine.", no_args_is_help=True)
base.command()(add)
base.command()(ls)
base.command()(rm)
