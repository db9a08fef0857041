"""`icm prune`: free the bytes that nothing needs."""

from __future__ import annotations

import re
from typing import Annotated

import typer

from icm_cli.errors import UsageProblem
from icm_cli.options import DryRunOpt, YesOpt
from icm_cli.session import Session, command
from icmlora.io.text import counted, human_size

_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}

OlderThanOpt = Annotated[str, typer.Option("--older-than", metavar="AGE", help="Only what is older, as 30m, 1h or 7d.")]


@command
def prune(session: Session, older_than: OlderThanOpt = "1h", dry_run: DryRunOpt = False, yes: YesOpt = False) -> None:
    """Delete blobs that no task needs any more, and what killed commands left behind.

    Nothing that is listed by `icm ls` changes. What is younger than --older-than stays, so that a running ingest is
    safe even where file locks do not work.

    Example:
      icm prune --dry-run
    """
    from icmlora.fleet.admin import prune_store

    out, grace = session.out, seconds(older_than)
    report = prune_store(session.context, grace=grace, dry_run=True)
    what = f"{counted(report.blobs, 'blob')} and {counted(report.temporary_files, 'temporary file')}"
    found = bool(report.blobs or report.temporary_files)
    deleted = False
    if found and not dry_run and out.confirm(f"Delete {what} ({human_size(report.freed_bytes)})?", yes=yes):
        report = prune_store(session.context, grace=grace, dry_run=False)
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
    """Return an age as `90`, `90s`, `30m`, `1h` or `7d` in seconds.

    Raises:
        UsageProblem: It is none of those.
    """
    match = re.fullmatch(r"(\d{1,9})([smhd]?)", age)
    if match is None:
        raise UsageProblem(f"{age!r} is no age", hint="give a number and a unit: 90s, 30m, 1h, 7d")
    return float(int(match[1]) * _UNITS[match[2]])
