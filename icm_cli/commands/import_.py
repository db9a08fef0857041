"""`icm import`: add the codes of a bundle to the store."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from icm_cli.command import Call, command
from icm_cli.errors import ExitCode
from icm_cli.session import Session
from icmlora.fleet.bundles.import_ import import_bundle
from icmlora.io.text import counted

if TYPE_CHECKING:
    from icmlora.fleet.bundles.import_ import ImportReport


@command(import_bundle)
def import_(session: Session, call: Call[ImportReport]) -> None:
    out, done = session.out, call.run(label="import")
    index = done.index
    out.document(
        {
            "dry_run": call["dry_run"],
            "bundle": done.digest,
            "base_model": index.base_model,
            "generator": index.generator.blob,
            "tasks": [{"task": name, "status": status} for name, status in done.tasks.items()],
            "refused": dict(done.refused),
        }
    )
    new = [name for name, status in done.tasks.items() if status in ("added", "encoded")]
    unchanged = list(done.tasks.values()).count("known")
    out.names(new)
    verb = "would import" if call["dry_run"] else "imported"
    out.line(f"{verb} {counted(len(new), 'code')} of {index.base_model}; {unchanged} unchanged")
    for name, status in done.tasks.items():
        out.detail(f"{name}: {status}")
    skipped = [name for name, status in done.tasks.items() if status == "skipped"]
    if skipped:
        out.warn(f"skipped tasks with a different adapter or code in the store: {', '.join(skipped)}")
    for name, reason in done.refused.items():
        out.warn(f"skipped {name}: {reason}", task=name)
    if done.refused:
        raise typer.Exit(ExitCode.PARTLY)
