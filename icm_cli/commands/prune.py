"""`icm prune`: delete bytes that no task needs."""

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
        "Delete only files older than this, such as 30m or 7d. Default: 1h, and 24h in an object store.",
    ),
]

EmptyOpt = Annotated[
    bool, option("--empty-quarantine", "Delete what would be set aside too, and what was set aside before.")
]


@command
def prune(
    session: Session,
    grace: GraceOpt = None,
    empty_quarantine: EmptyOpt = False,
    dry_run: DryRunOpt = False,
    yes: YesOpt = False,
) -> None:
    """Delete blobs that no task needs and files that interrupted commands left behind.

    Codes, generators, residuals and weights are not deleted but set aside, in the folder quarantine beside the blobs:
    should they be missed after all, copy them back. --empty-quarantine deletes them for good. Nothing is deleted while
    `icm verify` finds the database damaged.

    Where the bytes are in a place that is shared, it also deletes the originals that `icm evict` could not: they were
    too young. The codes that replace them are read and compared with their digests just before.

    This changes nothing that `icm ls` shows. Files younger than --grace stay, so a running `icm ingest` is safe
    even on file systems without locks.

    Example:
      icm prune --dry-run
    """
    from icmlora.fleet.tasks.verify import prune

    out, context = session.out, session.context
    least = None if grace is None else seconds(grace)
    report = prune(context, grace=least, empty_quarantine=empty_quarantine, dry_run=True)
    files = "file" if empty_quarantine else "temporary file"
    what = f"{counted(report.blobs, 'blob')} and {counted(report.temporary_files, files)}"
    aside = counted(report.set_aside, "file of a code or of weights", "files of codes and weights")
    found = bool(report.blobs or report.temporary_files or report.set_aside)
    deleted = False
    question = f"Delete {what} ({human_size(report.freed_bytes)})"
    question += f" and set {aside} aside ({human_size(report.set_aside_bytes)})?" if report.set_aside else "?"
    if found and not dry_run and out.confirm(question, yes=yes):
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
    verb = "deleted" if deleted else "would delete" if found else "nothing to delete:"
    out.line(f"{verb} {what}; {human_size(report.freed_bytes)}")
    if report.set_aside:
        verb = "set" if deleted else "would set"
        out.line(f"{verb} {aside} aside in quarantine; {human_size(report.set_aside_bytes)}")
        out.hint("`icm prune --empty-quarantine` deletes them for good")
    if report.young:
        what = f"{counted(report.young, 'blob')} that no task needs, {human_size(report.young_bytes)}"
        out.note(f"too young to go: {what}; --grace says how old they have to be")


def seconds(age: str) -> float:
    """Return an age such as `90`, `90s`, `30m`, `1h` or `7d` in seconds; raises `UsageProblem` of any other text."""
    match = re.fullmatch(r"(\d{1,9})([smhd]?)", age)
    if match is None:
        raise UsageProblem(f"invalid age {age!r}", hint="use a number and a unit, such as 90s, 30m, 1h or 7d")
    return float(int(match[1]) * _UNITS[match[2]])
