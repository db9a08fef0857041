"""`icm prune`: delete files that no task needs."""

from __future__ import annotations

import re
from typing import Annotated

from icm_cli.errors import UsageProblem
from icm_cli.options import DryRunOpt, YesOpt, option
from icm_cli.session import Session, command
from icmlora.io.text import counted, human_size, some

_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}

GraceOpt = Annotated[
    str | None,
    option(
        "--grace --older-than AGE",
        "Delete only files older than AGE, such as 30m or 7d. Default: 1h, or 24h in an object store.",
    ),
]

EmptyOpt = Annotated[bool, option("--empty-quarantine", "Also delete the damaged files in quarantine.")]


@command
def prune(
    session: Session,
    grace: GraceOpt = None,
    empty_quarantine: EmptyOpt = False,
    dry_run: DryRunOpt = False,
    yes: YesOpt = False,
) -> None:
    """Delete files that no task needs and leftovers of interrupted commands.

    These are earlier states of tasks, files of removed or evicted tasks, and generators that no code needs. Nothing is
    deleted if the database disagrees with the manifests. Files newer than --grace are kept, so a running `icm ingest`
    is safe.

    Example:
      icm prune --dry-run
    """
    from icmlora.fleet.tasks.verify import prune

    out, context = session.out, session.context
    min_age = None if grace is None else seconds(grace)
    report = prune(context, grace=min_age, empty_quarantine=empty_quarantine, dry_run=True)
    counts = [
        (report.blobs, "blob"),
        (report.manifests, "manifest"),
        (report.temporary_files, "file" if empty_quarantine else "temporary file"),
    ]
    found = ", ".join(counted(count, what) for count, what in counts if count)
    deleted = False
    if found and not dry_run and out.confirm(f"Delete {found} ({human_size(report.freed_bytes)})?", yes=yes):
        report = prune(context, grace=min_age, empty_quarantine=empty_quarantine)
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


def seconds(age: str) -> float:
    """Return an age such as `90`, `90s`, `30m`, `1h` or `7d` in seconds. Raise `UsageProblem` if it is invalid."""
    match = re.fullmatch(r"(\d{1,9})([smhd]?)", age)
    if match is None:
        raise UsageProblem(f"invalid age {age!r}", hint="use a number and a unit, such as 90s, 30m, 1h or 7d")
    return float(int(match[1]) * _UNITS[match[2]])
