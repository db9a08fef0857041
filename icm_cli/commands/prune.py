"""`icm prune`: delete files that no task needs."""

from __future__ import annotations

import re
from typing import Annotated

from icm_cli.errors import UsageProblem
from icm_cli.options import DryRunOpt, YesOpt, option
from icm_cli.session import Session, command
from icmlora.io.text import counted, human_size

_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}

GraceOpt = Annotated[
    str | None,
    option(
        "--grace --older-than AGE",
        "Delete only files older than AGE, such as 30m or 7d. Default: 1h, or 24h in an object store.",
    ),
]

EmptyOpt = Annotated[
    bool, option("--empty-quarantine", "Delete codes, weights and everything already in quarantine for good.")
]


@command
def prune(
    session: Session,
    grace: GraceOpt = None,
    empty_quarantine: EmptyOpt = False,
    dry_run: DryRunOpt = False,
    yes: YesOpt = False,
) -> None:
    """Delete blobs that no task needs and leftovers of interrupted commands.

    Unneeded codes, generators and weights are moved to the store's quarantine folder, and you can copy them back.
    --empty-quarantine deletes them for good. Nothing is deleted while the database is damaged.

    In shared storage, it also deletes evicted originals older than --grace, after checking the codes that replace them.

    Files newer than --grace are kept, so a running `icm ingest` is safe.

    Example:
      icm prune --dry-run
    """
    from icmlora.fleet.tasks.verify import prune

    out, context = session.out, session.context
    least = None if grace is None else seconds(grace)
    report = prune(context, grace=least, empty_quarantine=empty_quarantine, dry_run=True)
    files = "file" if empty_quarantine else "temporary file"
    what = f"{counted(report.blobs, 'blob')} and {counted(report.temporary_files, files)}"
    moved = counted(report.set_aside, "code or weights file")
    found = bool(report.blobs or report.temporary_files or report.set_aside)
    deleted = False
    question = f"Delete {what} ({human_size(report.freed_bytes)})"
    if report.set_aside:
        question += f" and move {moved} ({human_size(report.set_aside_bytes)}) to quarantine"
    if found and not dry_run and out.confirm(f"{question}?", yes=yes):
        report = prune(context, grace=least, empty_quarantine=empty_quarantine)
        deleted = True
    out.document(
        {
            "deleted": deleted,
            "blobs": report.blobs,
            "temporary_files": report.temporary_files,
            "size": report.freed_bytes,
            "set_aside": report.set_aside,
            "set_aside_size": report.set_aside_bytes,
            "young": report.young,
            "young_size": report.young_bytes,
        }
    )
    if found:
        out.line(f"{'deleted' if deleted else 'would delete'} {what} ({human_size(report.freed_bytes)})")
    else:
        out.line("deleted nothing")
    if report.set_aside:
        verb = "moved" if deleted else "would move"
        out.line(f"{verb} {moved} to quarantine ({human_size(report.set_aside_bytes)})")
        out.hint("run `icm prune --empty-quarantine` to delete them for good")
    for folder in report.folders:
        out.warn(f"skipped {folder}: icm creates no folders there")
    if report.young:
        out.note(f"kept {counted(report.young, 'blob')} newer than --grace ({human_size(report.young_bytes)})")


def seconds(age: str) -> float:
    """Return an age such as `90`, `90s`, `30m`, `1h` or `7d` in seconds. Raise `UsageProblem` if it is invalid."""
    match = re.fullmatch(r"(\d{1,9})([smhd]?)", age)
    if match is None:
        raise UsageProblem(f"invalid age {age!r}", hint="use a number and a unit, such as 90s, 30m, 1h or 7d")
    return float(int(match[1]) * _UNITS[match[2]])
