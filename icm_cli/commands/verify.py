"""`icm verify`: look for damage."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from icm_cli.errors import ExitCode, UsageProblem
from icm_cli.options import DryRunOpt, SomeTasksArg, YesOpt
from icm_cli.session import Session, command
from icmlora.io.text import counted

if TYPE_CHECKING:
    from registry.verify import Finding

ReadDataOpt = Annotated[
    bool, typer.Option("--read-data", help="Read and hash every blob; not only look at its length.")
]
RepairOpt = Annotated[
    bool, typer.Option("--repair", help="Move damaged blobs to quarantine; reads all data, deletes nothing.")
]


@command
def verify(
    session: Session,
    tasks: SomeTasksArg = None,
    read_data: ReadDataOpt = False,
    repair: RepairOpt = False,
    dry_run: DryRunOpt = False,
    yes: YesOpt = False,
) -> None:
    """Check the store: the database, every blob's presence and length, and with --read-data its bytes.

    Exit 1 means that something is wrong. What a killed command may leave (orphans, temporary files) is no problem, and
    is shown with --verbose.

    Example:
      icm verify --read-data
    """
    from icmlora.fleet.admin import find_damage, quarantine_damage

    if repair and tasks:
        raise UsageProblem("--repair works on the whole store", hint="leave the names out")
    findings = []
    for finding in find_damage(session.context, names=tasks or [], read_data=read_data or repair):
        findings.append(finding)
        _tell(session, finding)
    problems = [finding for finding in findings if finding.is_problem]
    moved = []
    movable = [finding for finding in problems if finding.kind in ("length", "digest")]
    question = f"Move {counted(len(movable), 'damaged blob')} to quarantine?"
    if repair and movable and not dry_run and session.out.confirm(question, yes=yes):
        moved = quarantine_damage(session.context)
    session.out.document(
        {
            "ok": not problems,
            "read_data": read_data or repair,
            "findings": [_as_json(finding) for finding in findings],
            "quarantined": [str(place) for _, place in moved],
        }
    )
    _sum_up(session, findings, problems, [finding for finding, _ in moved], read_data or repair)
    if problems:
        raise typer.Exit(ExitCode.FAILED)


def _sum_up(
    session: Session, findings: list[Finding], problems: list[Finding], moved: list[Finding], read_data: bool
) -> None:
    out = session.out
    if problems:
        out.line(f"{counted(len(problems), 'problem')} found")
    else:
        out.line("the store is in order" if read_data else "the store is in order (contents not read: --read-data)")
    affected = sorted({task for finding in problems for task in finding.tasks})
    if moved:
        out.line(f"moved {counted(len(moved), 'damaged blob')} to quarantine")
        out.hint(f"`icm ingest` of the original adapters restores: {', '.join(affected)}")
    elif any(finding.kind in ("length", "digest") for finding in problems):
        out.hint("`icm verify --repair` moves damaged blobs to quarantine, then `icm ingest` restores them")
    if len(findings) > len(problems):
        out.detail(f"{counted(len(findings) - len(problems), 'harmless leftover')}; `icm prune` removes them")


def _tell(session: Session, finding: Finding) -> None:
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
