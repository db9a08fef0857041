"""`icm export`: write a generator and codes to a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from icm_cli.command import plain_command as command
from icm_cli.errors import ExitCode
from icm_cli.options import BaseModelOpt, SomeTasksArg, argument, option
from icm_cli.session import Session
from icmlora.io.text import counted, human_size

if TYPE_CHECKING:
    from icmlora.fleet.bundles.export import ExportReport

FileArg = Annotated[Path, argument("FILE", "Bundle to write.")]
ReplaceOpt = Annotated[bool, option("--force -f", "Overwrite FILE if it exists.")]


@command
def export(
    session: Session,
    file: FileArg,
    tasks: SomeTasksArg = None,
    base_model: BaseModelOpt = None,
    force: ReplaceOpt = False,
) -> None:
    """Write a generator and the codes of tasks to a bundle file.

    On another machine, `icm materialize --from FILE` writes adapters without a store, and `icm import FILE` adds the
    bundle to a store. A bundle contains no originals or texts. Exports of an unchanged store are identical.

    Example:
      icm export fleet.icm
    """
    from icmlora.fleet.bundles.export import export_bundle

    with session.working("export") as context:
        done = export_bundle(context, file, tasks or (), base_model=base_model, force=force)
    _print_report(session, done)
    if done.damaged:
        raise typer.Exit(ExitCode.PARTLY)


def _print_report(session: Session, done: ExportReport) -> None:
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
            "of_other_generators": list(done.of_other_generators),
            "damaged": dict(done.damaged),
        }
    )
    out.names([str(done.file)])
    out.line(
        f"wrote {done.file}: generator {index.generator.version} of {index.base_model}, "
        f"{counted(len(index.tasks), 'code')}, {human_size(done.size)}"
    )
    if done.left_out:
        out.warn(f"skipped {counted(len(done.left_out), 'task')} without a code")
        out.detail(", ".join(done.left_out))
        out.hint("run `icm train --update` to encode them")
    if done.of_other_generators:
        out.warn(f"skipped {counted(len(done.of_other_generators), 'task')} whose code needs another generator")
        out.detail(", ".join(done.of_other_generators))
        out.hint("run `icm encode TASK` to encode them with the current generator")
    for name, reason in done.damaged.items():
        out.warn(f"skipped {name}: {reason}", task=name)
