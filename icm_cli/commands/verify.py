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

ReadDataOpt = Annotated[bool, option("--read-data", "Read and hash every blob instead of only checking its length.")]
DecodeOpt = Annotated[bool, option("--decode", "Decode every code whose original is there, and compare its error.")]
RepairOpt = Annotated[
    bool,
    option(
        "--repair",
        "Correct rows of which one bit flipped; read all data and move damaged blobs aside. Deletes nothing.",
    ),
]
RestoreOpt = Annotated[
    bool, option("--restore-database", "Put back the copy of the database from before the last deletion.")
]

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
    """Check the store for damage: the database with every row, the length of every blob, with --read-data its bytes.

    Exit code 1 means that something is wrong. Files that interrupted commands left behind are harmless and are listed
    with --verbose only. Remarks name adapters that do nothing; with --read-data also those that do not fit their base
    model, if it is on this machine.

    While a row of the database is damaged, its task is left out by other commands, and nothing is deleted. --repair
    corrects each row of which a single bit flipped, and puts a copy of the database into quarantine before. Before icm
    deletes something, it keeps a copy of the database. --restore-database puts that back, and the damaged one into
    quarantine; what was recorded after the copy has to be ingested or trained again.

    Example:
      icm verify --read-data
    """
    from icmlora.fleet.tasks.verify import repair_blobs

    if repair and tasks:
        raise UsageProblem("--repair works on the whole store", hint="leave out the task names")
    if restore_database:
        if tasks or repair or dry_run:
            raise UsageProblem("--restore-database stands alone", hint="leave out the task names and other options")
        _restore(session, yes=yes)
        return
    read_data |= repair
    findings = _look(session, tasks or (), read_data=read_data, decode=decode)
    rows = _repair_rows(session, findings, yes=yes) if repair and not dry_run else []
    if any(row.problem is None for row in rows):
        findings = _look(session, (), read_data=read_data, decode=decode)  # what was found before believed wrong rows
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


def _look(session: Session, tasks: Sequence[str], *, read_data: bool, decode: bool) -> list[Finding]:
    """Find what is wrong, and tell each finding at once."""
    from icmlora.fleet.tasks.verify import verify

    findings = []
    for finding in verify(session.context, tasks, read_data=read_data, decode=decode):
        findings.append(finding)
        _tell(session, finding)
    return findings


def _repair_rows(session: Session, findings: list[Finding], *, yes: bool) -> list[RowRepair]:
    """Correct rows of the database if something is wrong with it, and tell what became of each."""
    from icmlora.fleet.tasks.verify import repair_rows

    if not any(finding.kind in _OF_DATABASE for finding in findings):
        return []
    if not session.out.confirm("Correct the rows of which one bit flipped?", yes=yes):
        return []
    rows = repair_rows(session.context)
    for row in rows:
        about = f" (task {row.task})" if row.task else ""
        if row.problem:
            session.out.line(f"left alone: {row.row}{about}: {row.problem}")
        else:
            change = f": {row.column} from {row.before} to {row.after}" if row.column else ""
            session.out.line(f"corrected: {row.row}{about}{change}")
    return rows


def _restore(session: Session, *, yes: bool) -> None:
    from icmlora.fleet.tasks.verify import restore_database

    out = session.out
    if not out.confirm("Replace the database by the copy from before the last deletion?", yes=yes):
        return
    made = restore_database(session.context)
    out.document({"restored_from": made})
    out.line(f"the database is the one of {made} again; the damaged one is in quarantine")
    out.hint("`icm verify --read-data` says what is missing; ingest again what came after the copy")


def _sum_up(
    session: Session, findings: list[Finding], problems: list[Finding], moved: list[Finding], read_data: bool
) -> None:
    out = session.out
    if problems:
        out.line(f"{counted(len(problems), 'problem')} found")
    else:
        out.line("the store is intact" if read_data else "the store is intact (contents not read: use --read-data)")
    if any(finding.kind in _OF_DATABASE for finding in problems):
        copied = "`icm verify --restore-database` puts the copy back that was made before the last deletion"
        out.hint(f"`icm verify --repair` corrects rows of which one bit flipped; {copied}")
    affected = sorted({task for finding in problems for task in finding.tasks})
    if moved:
        out.line(f"moved {counted(len(moved), 'damaged blob')} to quarantine")
        out.hint(f"run `icm ingest` on the original adapters to restore: {', '.join(affected)}")
    elif any(finding.kind in ("length", "digest") for finding in problems):
        out.hint("run `icm verify --repair` to move damaged blobs to quarantine, then ingest their adapters again")
    leftovers = sum(finding.kind in ("orphan", "leftover") for finding in findings)
    if leftovers:
        out.detail(f"{counted(leftovers, 'harmless leftover')}; run `icm prune` to delete them")


def _tell(session: Session, finding: Finding) -> None:
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
