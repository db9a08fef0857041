"""`icm prune`: delete bytes that no task needs."""

from __future__ import annotations

import re
from typing import Annotated

import typer

from icm_cli.errors import UsageProblem
from icm_cli.options import DryRunOpt, YesOpt
from icm_cli.session import Session, command
from icmlora.io.text import counted, human_size

_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}

OlderThanOpt = Annotated[
    str, typer.Option("--older-than", metavar="AGE", help="Delete only files older than this, such as 30m, 1h or 7d.")
]


@command
def prune(session: Session, older_than: OlderThanOpt = "1h", dry_run: DryRunOpt = False, yes: YesOpt = False) -> None:
    """Delete blobs that no task needs and files that interrupted commands left behind.

    This changes nothing that `icm ls` shows. Files younger than --older-than stay, so a running `icm ingest` is safe
    even on file systems without locks.

    Example:
      icm prune --dry-run
    """
    out, fleet, grace = session.out, session.fleet, seconds(older_than)
    report = fleet.prune(grace=grace, dry_run=True)
    what = f"{counted(report.blobs, 'blob')} and {counted(report.temporary_files, 'temporary file')}"
    found = bool(report.blobs or report.temporary_files)
    deleted = False
    if found and not dry_run and out.confirm(f"Delete {what} ({human_size(report.freed_bytes)})?", yes=yes):
        report = fleet.prune(grace=grace)
        deleted = True
    out.document(
        {
            "deleted": deleted,
            "blobs": report.blobs,
            "temporary_files": report.temporary_files,
            "size": report.freed_bytes,
        }
    )
    verb = "deleted" if deleted else "would delete" if found else "nothing to delete:"
    out.line(f"{verb} {what}; {human_size(report.freed_bytes)}")


def seconds(age: str) -> float:
    """Return an age such as `90`, `90s`, `30m`, `1h` or `7d` in seconds."""
    match = re.fullmatch(r"(\d{1,9})([smhd]?)", age)
    if match is None:
        raise UsageProblem(f"invalid age {age!r}", hint="use a number and a unit, such as 90s, 30m, 1h or 7d")
    return float(int(match[1]) * _UNITS[match[2]])
