"""`icm verify`: check the store for damage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from icm_cli.command import plain_command as command
from icm_cli.errors import ExitCode, UsageProblem
from icm_cli.options import DryRunOpt, SomeTasksArg, YesOpt, option
from icm_cli.session import Session
from icmlora.io.text import counted, some

if TYPE_CHECKING:
    from icmlora.fleet.tasks.verify import Finding
    from registry.verify import Rebuilt

ReadDataOpt = Annotated[bool, option("--read-data", "Hash every blob instead of only checking its length.")]
DecodeOpt = Annotated[bool, option("--decode", "Decode codes that still have an original, and compare their errors.")]
RepairOpt = Annotated[
    bool,
    option(
        "--repair",
        "Rebuild a missing, damaged or old database from the manifests, correct flipped bits in small files, and move "
        "other damaged files to quarantine. Implies --read-data.",
    ),
]


@command
def verify(
    session: Session,
    tasks: SomeTasksArg = None,
    read_data: ReadDataOpt = False,
    decode: DecodeOpt = False,
    repair: RepairOpt = False,
    dry_run: DryRunOpt = False,
    yes: YesOpt = False,
) -> None:
    """Check the store for damage.

    Compares the database with the manifests, and checks the length of every blob. --read-data also checks the contents.
    The exit code is 1 if there are problems. Remarks are not problems: they name adapters that have no effect and, with
    --read-data, adapters that do not fit their base model, if it is on this machine, and changes that were not
    committed. -v also lists harmless leftovers of interrupted commands.

    Other commands skip damaged tasks, and delete nothing until the store is repaired.

    --repair deletes nothing. A removed task stays removed.

    Example:
      icm verify --read-data
    """
    from icmlora.fleet.tasks.verify import OF_FILES, rebuild_database, repair_files

    if repair and tasks:
        raise UsageProblem("--repair always repairs the whole store", hint="remove the task names")
    out, read_data, repair = session.out, read_data or repair, repair and not dry_run
    findings = _find(session, tasks or (), read_data=read_data, decode=decode)
    rebuilt = None
    question = "Rebuild the database from the manifests?"
    if repair and any(finding.is_of_database for finding in findings) and out.confirm(question, yes=yes):
        rebuilt = rebuild_database(session.context)
        _print_rebuilt(session, rebuilt)
        findings = _find(session, (), read_data=read_data, decode=decode)
    damaged = [finding for finding in findings if finding.kind in OF_FILES]
    question = f"Correct {counted(len(damaged), 'damaged file')}, or move them to quarantine?"
    repaired = repair_files(session.context, damaged) if repair and damaged and out.confirm(question, yes=yes) else []
    for finding, result in repaired:
        out.line(f"{finding.digest}: {result}")
    corrected = {finding.digest for finding, result in repaired if result.startswith("corrected")}
    problems = [one for one in findings if one.is_problem and one.digest not in corrected]
    out.document(
        {
            "ok": not problems,
            "read_data": read_data,
            "findings": [_as_json(finding) for finding in findings],
            "rebuilt": None if rebuilt is None else _rebuilt_as_json(rebuilt),
            "repaired": [{"digest": finding.digest, "result": result} for finding, result in repaired],
        }
    )
    _sum_up(session, findings, problems, read_data=read_data)
    if problems:
        raise typer.Exit(ExitCode.FAILED)


def _find(session: Session, tasks: Sequence[str], *, read_data: bool, decode: bool) -> list[Finding]:
    """Return all findings, and print each immediately."""
    from icmlora.fleet.context import Event
    from icmlora.fleet.tasks.verify import Found, verify

    def show(event: Event) -> None:
        if isinstance(event, Found):
            _print_finding(session, event.finding)

    with session.working("verify", show) as context:
        return verify(context, tasks, read_data=read_data, decode=decode)


def _print_finding(session: Session, finding: Finding) -> None:
    if finding.kind in ("remark", "uncommitted"):
        session.out.note(f"remark: {finding.message}")
        return
    tasks = f" (needed by {', '.join(finding.tasks)})" if finding.tasks else ""
    print_text = session.out.line if finding.is_problem else session.out.detail
    print_text(f"{finding.kind}: {finding.message}{tasks}")


def _print_rebuilt(session: Session, rebuilt: Rebuilt) -> None:
    out = session.out
    out.line(f"rebuilt the database from the manifests: {counted(rebuilt.tasks, 'task')}")
    if rebuilt.restored:
        out.line(f"restored: {some(rebuilt.restored)}")
    if rebuilt.removed:
        out.note(f"removed earlier, and not restored: {some(rebuilt.removed)}")
    if rebuilt.lost:
        out.warn(f"no manifest can be read of: {some(rebuilt.lost)}")
        out.hint("run `icm ingest` on their original adapters, or restore manifests/ from a backup")


def _sum_up(session: Session, findings: Sequence[Finding], problems: Sequence[Finding], *, read_data: bool) -> None:
    from icmlora.fleet.tasks.verify import OF_FILES

    out = session.out
    if problems:
        out.line(f"found {counted(len(problems), 'problem')}")
    else:
        out.line("the store is intact" if read_data else "the store is intact (contents not checked; use --read-data)")
    if any(finding.is_of_database for finding in findings):
        out.hint("run `icm verify --repair` to rebuild the database from the manifests")
    elif any(finding.kind in OF_FILES for finding in problems):
        out.hint("run `icm verify --repair` to correct damaged files, or to move them to quarantine")
    if affected := sorted({task for one in problems if one.kind in OF_FILES | {"missing"} for task in one.tasks}):
        out.hint(f"run `icm ingest` on the original adapters of {some(affected)} to restore their files")
    leftovers = sum(finding.kind in ("orphan", "leftover") for finding in findings)
    if leftovers:
        out.detail(f"found {counted(leftovers, 'harmless leftover')}; run `icm prune` to delete them")


def _rebuilt_as_json(rebuilt: Rebuilt) -> dict[str, object]:
    return {
        "tasks_count": rebuilt.tasks,
        "restored": list(rebuilt.restored),
        "removed": list(rebuilt.removed),
        "lost": list(rebuilt.lost),
    }


def _as_json(finding: Finding) -> dict[str, object]:
    return {
        "kind": finding.kind,
        "message": finding.message,
        "path": finding.path,
        "digest": finding.digest,
        "tasks": list(finding.tasks),
        "is_problem": finding.is_problem,
    }
