"""`icm ingest`: take adapters into the store."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from icm_cli.errors import ExitCode, Interrupted
from icm_cli.options import DeviceOpt, DryRunOpt, OnConflict
from icm_cli.session import Session, command
from icmlora.io.text import counted, human_size

if TYPE_CHECKING:
    from icmlora.fleet.context import Event, StopFlag
    from icmlora.fleet.ingest import IngestReport

PathsArg = Annotated[
    list[Path], typer.Argument(metavar="PATH...", help="Folders that hold adapters, at any depth.", show_default=False)
]
NameOpt = Annotated[
    str | None,
    typer.Option("--name", metavar="NAME", help="Name of the one task found; else its folder's.", show_default=False),
]
SamplesOpt = Annotated[
    Path | None,
    typer.Option(
        "--samples",
        metavar="FILE",
        help="Training texts of the one task found, as JSON lines; else samples.jsonl beside it.",
        show_default=False,
    ),
]
TextsOpt = Annotated[
    bool, typer.Option("--texts/--no-texts", help="Take samples.jsonl and eval.jsonl where they lie beside adapters.")
]
SkipBadOpt = Annotated[bool, typer.Option("--skip-bad", help="Go on past what is refused; exit 3 says that some was.")]
OnConflictOpt = Annotated[
    OnConflict, typer.Option("--on-conflict", help="A task of that name has another adapter: what to do.")
]

RestoreOpt = Annotated[
    bool, typer.Option("--restore", help="Bring back originals that were evicted; else they stay evicted.")
]
VectorsOpt = Annotated[
    bool, typer.Option("--vectors/--no-vectors", help="Extract task vectors where the base model is found.")
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
    """Take adapters into the store: PEFT folders, or runs with checkpoint-N folders.

    The files are read, checked and copied; nothing in PATH is changed. The same again changes nothing. What could
    not be given back exactly is refused by name. Where the base model is on this machine, task vectors are
    extracted too; else `icm vectors` does that later.

    A task is called like its folder. Where that is called adapter, best, final, lora, model, output or the like, it is
    called like the folder above.

    Example:
      icm ingest ./loras
    """
    from icmlora.fleet.ingest import IngestRequest
    from icmlora.fleet.ingest import ingest as take_in

    request = IngestRequest(
        paths=tuple(paths),
        name=name,
        samples=samples,
        skip_bad=skip_bad,
        on_conflict=on_conflict.value,
        dry_run=dry_run,
        restore=restore,
        texts=texts,
    )
    with session.stoppable() as stop:
        report = session.follow(take_in(session.context, request, stop), "ingest", partial(_tell, session, set()))
        _tell_sum(session, report, dry_run=dry_run)
        if vectors and report.without_vectors and not report.stopped:
            _extract(session, report, session.device(device), stop)
    _tell_end(session, report, dry_run=dry_run)
    if report.stopped:
        done = f"{len(report.ingested)} of {counted(report.found, 'task')}"
        raise Interrupted(f"interrupted; {done} ingested", hint="run the same command to continue")
    if report.refused:
        raise typer.Exit(ExitCode.PARTLY)


def _extract(session: Session, report: IngestReport, device: str, stop: StopFlag) -> None:
    """Extract the task vectors of the tasks whose base model is on this machine."""
    from icmlora.fleet.admin import with_local_base

    ready = with_local_base(session.context, report.without_vectors)
    if not ready:
        return
    # torch and transformers take seconds to import; most ingests on a machine without the base model need neither.
    from icmlora.fleet.vectors import extract_missing

    work = extract_missing(session.context, ready, device=device, again=False, stop=stop)
    extracted = session.follow(work, "task vectors", partial(_tell, session, set()))
    done = {entry.task for entry in extracted.tasks}
    report.without_vectors = [task for task in report.without_vectors if task not in done]
    report.stopped = extracted.stopped
    session.out.line(f"extracted task vectors of {counted(len(done), 'task')}")


def _tell(session: Session, hints: set[str], event: Event) -> None:
    """Say what became of a task; a hint is given once, however many refusals have it."""
    from icmlora.fleet.ingest import Ingested, Refused

    if isinstance(event, Ingested):
        session.out.event("task", **asdict(event))
        session.out.detail(f"{event.task}: {event.status}, {event.new} new, {event.known} known")
    elif isinstance(event, Refused):
        session.out.warn(f"{event.path}: {event.message}", kind=event.kind, path=event.path, hint=event.hint)
        if event.hint is not None and event.hint not in hints:
            hints.add(event.hint)
            session.out.hint(event.hint)
    else:  # a task's vectors, from `extract_missing`
        session.out.event("vectors", **asdict(event))


def _tell_sum(session: Session, report: IngestReport, *, dry_run: bool) -> None:
    verb = "would ingest" if dry_run else "ingested"
    some = [(report.evicted, "evicted"), (report.restored, "restored"), (len(report.refused), "refused")]
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
        session.out.hint("`icm vectors` makes them; it needs the base model (`icm base ls` says whether it is found)")
