"""`icm export`: a generator with codes as one file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from icm_cli.options import BaseModelOpt, SomeTasksArg
from icm_cli.session import Session, command
from icmlora.io.text import counted, human_size

if TYPE_CHECKING:
    from icmlora.fleet.bundles import Exported

FileArg = Annotated[Path, typer.Argument(metavar="FILE", help="The bundle to write.", show_default=False)]
ReplaceOpt = Annotated[bool, typer.Option("--force", "-f", help="Replace FILE if it exists.")]


@command
def export(
    session: Session,
    file: FileArg,
    tasks: SomeTasksArg = None,
    base_model: BaseModelOpt = None,
    force: ReplaceOpt = False,
) -> None:
    """Write the generator with the codes of some tasks into one portable file.

    Where FILE is, `icm materialize --from FILE` writes adapters without a store, and `icm import FILE` takes all into
    one. It holds no original, no residual and no text. The same store gives the same bytes.

    Example:
      icm export fleet.icm
    """
    from icmlora.fleet.bundles import ExportRequest
    from icmlora.fleet.bundles import export as write

    request = ExportRequest(file, tuple(tasks or ()), base_model, force)
    _tell(session, session.follow(write(session.context, request), "export"))


def _tell(session: Session, done: Exported) -> None:
    out, index = session.out, done.index
    out.document(
        {
            "output": str(done.file),
            "bundle": done.digest,
            "size": done.size,
            "base_model": index.base_model,
            "generator": index.generator.blob,
            "generator_version": index.generator.version,
            "tasks": [task.name for task in index.tasks],
            "left_out": list(done.left_out),
            "without_residual": list(done.without_residual),
        }
    )
    if out.is_quiet:
        out.answer(str(done.file))
    out.line(
        f"{done.file}: generator {index.generator.version} of {index.base_model} with "
        f"{counted(len(index.tasks), 'code')}; {human_size(done.size)}"
    )
    if done.left_out:
        out.warn(f"{counted(len(done.left_out), 'task')} without a code left out")
        out.detail(", ".join(done.left_out))
        out.hint("`icm train --update` makes theirs")
    if done.without_residual:
        out.note(f"a bundle carries codes: the residual of {counted(len(done.without_residual), 'task')} stays behind")
        out.detail(", ".join(done.without_residual))
