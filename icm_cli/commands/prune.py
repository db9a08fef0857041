"""`icm prune`: delete files that no task needs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from icm_cli.command import Call, command
from icm_cli.options import YesOpt
from icm_cli.session import Session
from icmlora.fleet.tasks import verify
from icmlora.io.text import counted, human_size, some

if TYPE_CHECKING:
    from icmlora.fleet.tasks.verify import PruneReport


@command(verify.prune)
def prune(session: Session, call: Call[PruneReport], yes: YesOpt = False) -> None:
    out, report = session.out, call.now(dry_run=True)
    counts = [
        (report.blobs, "blob"),
        (report.manifests, "manifest"),
        (report.temporary_files, "file" if call["empty_quarantine"] else "temporary file"),
    ]
    found = ", ".join(counted(count, what) for count, what in counts if count)
    deleted = False
    if found and not call["dry_run"] and out.confirm(f"Delete {found} ({human_size(report.freed_bytes)})?", yes=yes):
        report = call.now()
        deleted = True
    out.document(
        {
            "deleted": deleted,
            "blobs": report.blobs,
            "manifests": report.manifests,
            "generators": report.generators,
            "temporary_files": report.temporary_files,
            "size": report.freed_bytes,
            "young": report.young,
            "young_size": report.young_bytes,
            "unlisted": list(report.unlisted),
        }
    )
    if found:
        out.line(f"{'deleted' if deleted else 'would delete'} {found} ({human_size(report.freed_bytes)})")
    else:
        out.line("deleted nothing")
    if report.generators:
        out.note(f"among them {counted(report.generators, 'generator')} that no code needs")
    for folder in report.folders:
        out.warn(f"skipped {folder}: icm creates no folders there")
    if report.young:
        out.note(f"kept {counted(report.young, 'file')} newer than --grace ({human_size(report.young_bytes)})")
    if report.unlisted:
        out.note(f"kept files of {some(report.unlisted)}: the database lacks their last changes")
        out.hint("run `icm verify` to see why")
