"""`icm verify`: check the store for damage."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from icm_cli.command import Call, command
from icm_cli.errors import ExitCode, UsageProblem
from icm_cli.options import YesOpt
from icm_cli.session import Session
from icm_cli.text import as_fields
from icmlora.fleet.params import DryRun, Param
from icmlora.fleet.tasks import verify as verification
from icmlora.fleet.tasks.verify import Found, rebuild_database, repair_files
from icmlora.io.text import counted, some

if TYPE_CHECKING:
    from icmlora.fleet.context import Event
    from registry.findings import Finding

RepairOpt = Annotated[
    bool,
    Param(
        "Rebuild a missing, damaged or old database from the manifests, correct flipped bits in small files, and move "
        "other damaged files to quarantine. Implies --read-data.",
        "--repair",
    ),
]


@command(verification.verify)
def verify(
    session: Session,
    call: Call[list[Finding]],
    repair: RepairOpt = False,
    dry_run: DryRun = False,
    yes: YesOpt = False,
) -> None:
    if repair and call["tasks"]:
        raise UsageProblem("--repair always repairs the whole store", hint="remove the task names")
    out, read_data, repair = session.out, call["read_data"] or repair, repair and not dry_run
    find = partial(call.run, lambda event: _print_finding(session, event), read_data=read_data)
    findings, rebuilt = find(), None
    question = "Rebuild the database from the manifests?"
    if repair and any(finding.is_of_database for finding in findings) and out.confirm(question, yes=yes):
        rebuilt = rebuild_database(session.context)
        out.line(f"rebuilt the database from the manifests: {counted(rebuilt.tasks, 'task')}")
        if rebuilt.restored:
            out.line(f"restored: {some(rebuilt.restored)}")
        if rebuilt.removed:
            out.note(f"removed earlier, and not restored: {some(rebuilt.removed)}")
        if rebuilt.lost:
            out.warn(f"no manifest can be read of: {some(rebuilt.lost)}")
            out.hint("run `icm ingest` on their original adapters, or restore manifests/ from a backup")
        findings = find()
    damaged = [finding for finding in findings if finding.is_of_file]
    question = f"Correct {counted(len(damaged), 'damaged file')}, or move them to quarantine?"
    repaired = repair_files(session.context, damaged) if repair and damaged and out.confirm(question, yes=yes) else []
    for finding, result in repaired:
        out.line(f"{finding.digest}: {result}")
    corrected = {finding.digest for finding, result in repaired if result.startswith("corrected")}
    problems = [one for one in findings if one.is_problem and one.digest not in corrected]
    names = ("kind", "message", "path", "digest", "tasks", "is_problem")
    out.document(
        {
            "ok": not problems,
            "read_data": read_data,
            "findings": [{name: getattr(finding, name) for name in names} for finding in findings],
            "rebuilt": None if rebuilt is None else as_fields(rebuilt, "tasks") | {"tasks_count": rebuilt.tasks},
            "repaired": [{"digest": finding.digest, "result": result} for finding, result in repaired],
        }
    )
    if problems:
        out.line(f"found {counted(len(problems), 'problem')}")
    else:
        out.line("the store is intact" if read_data else "the store is intact (contents not checked; use --read-data)")
    if any(finding.is_of_database for finding in findings):
        out.hint("run `icm verify --repair` to rebuild the database from the manifests")
    elif any(finding.is_of_file for finding in problems):
        out.hint("run `icm verify --repair` to correct damaged files, or to move them to quarantine")
    if affected := sorted({task for one in problems if one.is_of_file or one.kind == "missing" for task in one.tasks}):
        out.hint(f"run `icm ingest` on the original adapters of {some(affected)} to restore their files")
    leftovers = sum(finding.kind in ("orphan", "leftover") for finding in findings)
    if leftovers:
        out.detail(f"found {counted(leftovers, 'harmless leftover')}; run `icm prune` to delete them")
    if problems:
        raise typer.Exit(ExitCode.FAILED)


def _print_finding(session: Session, event: Event) -> None:
    if not isinstance(event, Found):
        return
    finding = event.finding
    if finding.kind in ("remark", "uncommitted"):
        session.out.note(f"remark: {finding.message}")
        return
    tasks = f" (needed by {', '.join(finding.tasks)})" if finding.tasks else ""
    print_text = session.out.line if finding.is_problem else session.out.detail
    print_text(f"{finding.kind}: {finding.message}{tasks}")
