"""`icm export`: write a generator and codes to a bundle."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from icm_cli.command import Call, command
from icm_cli.errors import ExitCode
from icm_cli.session import Session
from icmlora.fleet.bundles.export import export_bundle
from icmlora.io.text import counted, human_size

if TYPE_CHECKING:
    from icmlora.fleet.bundles.export import ExportReport


@command(export_bundle)
def export(session: Session, call: Call[ExportReport]) -> None:
    out, done = session.out, call.run(label="export")
    index = done.index
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
    if done.damaged:
        raise typer.Exit(ExitCode.PARTLY)
