"""`icm verify`: check the store for damage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from icm_cli.errors import ExitCode, UsageProblem
from icm_cli.options import DryRunOpt, SomeTasksArg, YesOpt, option
from icm_cli.session import Session, command
from icmlora.io.text import counted

if TYPE_CHECKING:
    from icmlora.fleet.tasks.verify import Finding, RowRepair

ReadDataOpt = Annotated[bool, option("--read-data", "Hash every blob instead of only checking its length.")]
DecodeOpt = Annotated[bool, option("--decode", "Decode codes that still have an original, and compare their errors.")]
RepairOpt = Annotated[
    bool,
    option(
        "--repair",
        "Correct database rows with one flipped bit, and move damaged blobs to quarantine. Implies --read-data.",
    ),
]
RestoreOpt = Annotated[bool, option("--restore-database", "Restore the database backup made before the last deletion.")]

_OF_DATABASE = ("row", "database", "dangling")


@command
def verify(
    session: Session,
    tasks: SomeTasksArg = None,
    read_data: ReadDataOpt = False,
    decode: DecodeOpt = False,
    repair: RepairOpt = False,
    restore_database: RestoreOpt = False,
    dry_run: DryRunOpt = False,
    yes: YesOpt = False,
) -> None:
    """Check the store for damage.

    Checks every database row and the length of every blob. --read-data also checks the contents. The exit code is 1 if
    there are problems. Remarks are not problems: they name adapters that have no effect and, with --read-data,
    adapters that do not fit their base model, if it is on this machine. -v also lists harmless leftovers of
    interrupted commands.

    Other commands skip tasks with damaged rows, and delete nothing until the rows are repaired.

    --repair first copies the database to quarantine. --restore-database moves the damaged database to quarantine. Any
    later changes are lost, so ingest or train those tasks again.

    Example:
      icm verify --read-data
    """
    from icmlora.fleet.tasks.verify import repair_blobs

    if repair and tasks:
        raise UsageProblem("--repair always repairs the whole store", hint="remove the task names")
    if restore_database:
        if tasks or repair or dry_run:
            raise UsageProblem("--restore-database cannot be combined", hint="remove the task names and other options")
        _restore(session, yes=yes)
        return
    read_data |= repair
    findings = _find(session, tasks or (), read_data=read_data, decode=decode)
    rows = _repair_rows(session, findings, yes=yes) if repair and not dry_run else []
    if any(row.problem is None for row in rows):
        findings = _find(session, (), read_data=read_data, decode=decode)  # the first findings relied on damaged rows
    problems = [finding for finding in findings if finding.is_problem]
    moved = []
    movable = [finding for finding in problems if finding.kind in ("length", "digest")]
    question = f"Move {counted(len(movable), 'damaged blob')} to quarantine?"
    if repair and movable and not dry_run and session.out.confirm(question, yes=yes):
        moved = repair_blobs(session.context)
    session.out.document(
        {
            "ok": not problems,
            "read_data": read_data,
            "findings": [_as_json(finding) for finding in findings],
            "corrected": [asdict(row) for row in rows],
            "quarantined": [str(place) for _, place in moved],
        }
    )
    _sum_up(session, findings, problems, [finding for finding, _ in moved], read_data)
    if problems:
        raise typer.Exit(ExitCode.FAILED)


def _find(session: Session, tasks: Sequence[str], *, read_data: bool, decode: bool) -> list[Finding]:
    """Return all findings, and print each immediately."""
    from icmlora.fleet.tasks.verify import verify

    findings = []
    for finding in verify(session.context, tasks, read_data=read_data, decode=decode):
        findings.append(finding)
        _print_finding(session, finding)
    return findings


def _repair_rows(session: Session, findings: list[Finding], *, yes: bool) -> list[RowRepair]:
    """Correct damaged rows of the database, and print the result for each."""
    from icmlora.fleet.tasks.verify import repair_rows

    if not any(finding.kind in _OF_DATABASE for finding in findings):
        return []
    if not session.out.confirm("Correct rows with one flipped bit?", yes=yes):
        return []
    rows = repair_rows(session.context)
    for row in rows:
        task = f" (task {row.task})" if row.task else ""
        if row.problem:
            session.out.line(f"skipped {row.row}{task}: {row.problem}")
        else:
            change = f": {row.column} from {row.before} to {row.after}" if row.column else ""
            session.out.line(f"corrected {row.row}{task}{change}")
    return rows


def _restore(session: Session, *, yes: bool) -> None:
    from icmlora.fleet.tasks.verify import restore_database

    out = session.out
    if not out.confirm("Replace the database with the backup made before the last deletion?", yes=yes):
        return
    made = restore_database(session.context)
    out.document({"restored_from": made})
    out.line(f"restored the database backup from {made}; the damaged database is in quarantine")
    out.hint("run `icm verify --read-data` to list missing data, then ingest newer adapters again")


def _sum_up(
    session: Session, findings: list[Finding], problems: list[Finding], moved: list[Finding], read_data: bool
) -> None:
    out = session.out
    if problems:
        out.line(f"found {counted(len(problems), 'problem')}")
    else:
        out.line("the store is intact" if read_data else "the store is intact (contents not checked; use --read-data)")
    if any(finding.kind in _OF_DATABASE for finding in problems):
        out.hint("run `icm verify --repair` to correct rows with one flipped bit")
        out.hint("or run `icm verify --restore-database` to restore the backup made before the last deletion")
    affected = sorted({task for finding in problems for task in finding.tasks})
    if moved:
        out.line(f"moved {counted(len(moved), 'damaged blob')} to quarantine")
        out.hint(f"run `icm ingest` on the original adapters of {', '.join(affected)} to restore them")
    elif any(finding.kind in ("length", "digest") for finding in problems):
        out.hint("run `icm verify --repair` to move damaged blobs to quarantine, then ingest their adapters again")
    leftovers = sum(finding.kind in ("orphan", "leftover") for finding in findings)
    if leftovers:
        out.detail(f"found {counted(leftovers, 'harmless leftover')}; run `icm prune` to delete them")


def _print_finding(session: Session, finding: Finding) -> None:
    if finding.kind == "remark":
        session.out.note(f"remark: {finding.message}")
        return
    tasks = f" (needed by {', '.join(finding.tasks)})" if finding.tasks else ""
    text = f"{finding.kind}: {finding.message}{tasks}"
    if finding.is_problem:
        session.out.line(text)
    else:
        session.out.detail(text)


def _as_json(finding: Finding) -> dict[str, object]:
    return {
        "kind": finding.kind,
        "message": finding.message,
        "path": str(finding.path),
        "digest": finding.digest,
        "tasks": list(finding.tasks),
        "is_problem": finding.is_problem,
    }
