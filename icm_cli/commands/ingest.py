"""`icm ingest`: take adapters into the store."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from icm_cli.commands.vectors import tell_vectors
from icm_cli.errors import ExitCode, Interrupted
from icm_cli.options import DeviceOpt, DryRunOpt, OnConflict
from icm_cli.session import Session, command
from icmlora.errors import BaseModelMismatch, DataError
from icmlora.io.text import counted, human_size

if TYPE_CHECKING:
    from icmlora.fleet.context import Event
    from icmlora.fleet.ingest import IngestReport

PathsArg = Annotated[
    list[Path], typer.Argument(metavar="PATH...", help="Folders with adapters, at any depth.", show_default=False)
]
NameOpt = Annotated[
    str | None,
    typer.Option(
        "--name",
        metavar="NAME",
        help="Name of the task, if there is only one. Default: the name of its folder.",
        show_default=False,
    ),
]
SamplesOpt = Annotated[
    Path | None,
    typer.Option(
        "--samples",
        metavar="FILE",
        help="Samples of the task, if there is only one. Default: samples.jsonl next to its adapter.",
        show_default=False,
    ),
]
TextsOpt = Annotated[
    bool,
    typer.Option("--texts/--no-texts", help="Also ingest the samples.jsonl and eval.jsonl found next to adapters."),
]
SkipBadOpt = Annotated[
    bool, typer.Option("--skip-bad", help="Skip inputs that are refused; exit with code 3 if there were any.")
]
OnConflictOpt = Annotated[
    OnConflict,
    typer.Option("--on-conflict", help="What to do if the store has a task of that name with another adapter."),
]
RestoreOpt = Annotated[
    bool, typer.Option("--restore", help="Bring evicted originals back. By default they stay evicted.")
]
VectorsOpt = Annotated[
    bool, typer.Option("--vectors/--no-vectors", help="Extract task vectors if the base model is on this machine.")
]


@command
def ingest(
    session: Session,
    paths: PathsArg,
    name: NameOpt = None,
    samples: SamplesOpt = None,
    texts: TextsOpt = True,
    skip_bad: SkipBadOpt = False,
    on_conflict: OnConflictOpt = OnConflict.FAIL,
    restore: RestoreOpt = False,
    vectors: VectorsOpt = True,
    device: DeviceOpt = None,
    dry_run: DryRunOpt = False,
) -> None:
    """Take adapters into the store: PEFT folders, or training runs with checkpoint-N folders.

    Files are checked and copied; nothing in PATH is changed. Running the same command again changes nothing. An
    adapter that icm could not give back exactly is refused. If the base model is on this machine, task vectors are
    extracted too; otherwise run `icm vectors` later.

    A task is named after its folder. If the folder is called adapter, best, final, lora, model, output or similar, the
    task is named after the folder above it.

    Example:
      icm ingest ./loras
    """
    report, stopped = session.run(
        "ingest",
        lambda fleet: fleet.ingest(
            paths,
            name=name,
            samples=samples,
            texts=texts,
            skip_bad=skip_bad,
            on_conflict=on_conflict.value,
            restore=restore,
            dry_run=dry_run,
        ),
        partial(_tell, session, set()),
    )
    _tell_sum(session, report, dry_run=dry_run)
    partly = bool(report.refused)
    if vectors and report.extractable and not stopped:
        stopped, failed = _extract(session, report, session.device(device))
        partly = partly or failed
    _tell_end(session, report, dry_run=dry_run)
    if stopped:
        done = f"{len(report.ingested)} of {counted(report.found, 'task')}"
        raise Interrupted(f"interrupted; {done} ingested", hint="run the same command to continue")
    if partly:
        raise typer.Exit(ExitCode.PARTLY)


def _extract(session: Session, report: IngestReport, device: str) -> tuple[bool, bool]:
    """Extract task vectors where that is possible, and return whether the user stopped it and whether any failed."""
    try:
        extracted, stopped = session.run(
            "task vectors",
            lambda fleet: fleet.extract_vectors(report.extractable, device=device),
            partial(tell_vectors, session),
        )
    except (BaseModelMismatch, DataError) as error:  # of the only task, and its adapter is stored
        session.out.warn(f"{report.extractable[0]}: {error.message}", kind="vectors", hint=error.hint)
        return False, True
    done = {entry.task for entry in extracted.tasks}
    report.without_vectors = [task for task in report.without_vectors if task not in done]
    session.out.line(f"extracted the vectors of {counted(len(done), 'task')}")
    for note in extracted.notes:
        session.out.note(note)
    return stopped, bool(extracted.failed)


def _tell(session: Session, hints: set[str], event: Event) -> None:
    """Report one task or one refusal; each hint is printed once, however many refusals share it."""
    from icmlora.fleet.ingest import InputRefused, TaskIngested

    if isinstance(event, TaskIngested):
        session.out.event("task", **asdict(event))
        session.out.detail(f"{event.task}: {event.status}, {event.new} new, {event.known} known")
        for name, read in (("samples", event.samples), ("held-out text", event.eval_data)):
            if read is not None and read.skipped:
                rows = f"kept {counted(read.kept, 'row')}, skipped {read.skipped:,}"
                session.out.note(f"{event.task}: {name}: {rows}; the first: {read.reason}")
    elif isinstance(event, InputRefused):
        session.out.warn(f"{event.path}: {event.message}", kind=event.kind, path=event.path, hint=event.hint)
        if event.hint is not None and event.hint not in hints:
            hints.add(event.hint)
            session.out.hint(event.hint)


def _tell_sum(session: Session, report: IngestReport, *, dry_run: bool) -> None:
    verb = "would ingest" if dry_run else "ingested"
    in_part = sum(refused.in_part for refused in report.refused)
    some = [(report.evicted, "evicted"), (report.restored, "restored")]
    some += [(len(report.refused) - in_part, "refused"), (in_part, "not usable as text")]
    more = "".join(f", {count} {what}" for count, what in some if count)
    session.out.line(
        f"{verb} {counted(len(report.ingested), 'task')}: {counted(report.new, 'new adapter')}, "
        f"{report.known} known{more}; {human_size(report.size)}"
    )
    if report.evicted:
        session.out.hint("evicted originals stay evicted; `--restore` brings them back")


def _tell_end(session: Session, report: IngestReport, *, dry_run: bool) -> None:
    session.out.event(
        "summary",
        dry_run=dry_run,
        tasks=len(report.ingested),
        new=report.new,
        known=report.known,
        evicted=report.evicted,
        restored=report.restored,
        refused=len(report.refused),
        size=report.size,
        without_vectors=report.without_vectors,
    )
    if report.without_vectors:
        session.out.note(f"{counted(len(report.without_vectors), 'task')} without task vectors")
        session.out.hint("run `icm vectors` to extract them; `icm base ls` shows whether the base model is found")
