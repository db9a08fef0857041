"""`icm restore`: bring adapters back to the folders in which `icm evict --placeholder` left placeholders."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from icm_cli.errors import ExitCode, Interrupted
from icm_cli.options import DryRunOpt, FromOpt
from icm_cli.output import Column
from icm_cli.session import Session, command
from icm_cli.text import as_fields
from icmlora.fleet.measure.precision import gain_text
from icmlora.io.text import counted, human_size

if TYPE_CHECKING:
    from icm_cli.output import Output
    from icmlora.fleet.context import Event
    from icmlora.fleet.evict.restore import AdapterRestored, RestoreReport

FoldersArg = Annotated[
    list[Path],
    typer.Argument(metavar="FOLDER...", help="Folders with placeholders, at any depth.", show_default=False),
]

_COLUMNS = (
    Column("folder", shrink=True),
    Column("task", shrink=True),
    Column("from"),
    Column("size", right=True),
    Column("relative error", right=True),
    Column("retained gain", right=True),
)
_FROM = {"original": "original", "residual": "code and residual", "code": "code"}


@command
def restore(session: Session, folders: FoldersArg, bundle: FromOpt = None, dry_run: DryRunOpt = False) -> None:
    """Bring adapters back to the folders in which `icm evict --placeholder` left placeholders.

    An adapter comes back byte for byte if the store kept its original. Otherwise it is decoded from its code, in the
    form of its original, and the table says what was lost. With --from, codes are read from a bundle and no store is
    needed. Files that are in a folder are never overwritten, and a placeholder goes only when its adapter is complete.
    What cannot be restored is listed and never stops the rest; the exit code is then 3, or 15 if the disk is full.

    icm opens only the store you pass with --store, not the one that a placeholder names.

    Example:
      icm restore ./loras
      icm restore ./loras/dog-detection --from fleet.icm
    """
    from icmlora.fleet.evict.restore import restore

    refused: list[AdapterRestored] = []
    try:
        report, stopped = session.run(
            "restore",
            lambda context: restore(context, folders, bundle=bundle, dry_run=dry_run),
            lambda event: _tell(session, refused, event),
        )
    except Exception:
        if len(refused) > 1:  # one alone is what the error says
            _tell_refused(session.out, refused)
        raise
    _sum_up(session.out, report, dry_run=dry_run)
    if stopped:
        done = counted(len(report.restored), "adapter")
        raise Interrupted(f"interrupted; {done} restored", hint="run the same command to continue")
    if report.refused:
        raise typer.Exit(ExitCode.NO_SPACE if report.is_full else ExitCode.PARTLY)


def _tell(session: Session, refused: list[AdapterRestored], event: Event) -> None:
    from icmlora.fleet.evict.restore import AdapterRestored

    if isinstance(event, AdapterRestored):
        session.out.event("adapter", **as_fields(event))
        refused.extend([event] if event.status == "refused" else [])


def _sum_up(out: Output, report: RestoreReport, *, dry_run: bool) -> None:
    done = report.restored
    exact = sum(adapter.source == "original" for adapter in done)
    out.event(
        "summary",
        dry_run=dry_run,
        restored=len(done),
        exact=exact,
        from_codes=len(done) - exact,
        refused=len(report.refused),
        size=report.size,
    )
    if out.is_quiet:
        for adapter in done:
            out.answer(adapter.path)
    if not report.adapters:
        out.line("no placeholder was found")
        return
    out.table(_COLUMNS, [_cells(adapter) for adapter in done])
    _tell_refused(out, report.refused)
    for adapter in done:
        if adapter.converted_from is not None:
            out.note(
                f"{adapter.task}: safetensors were written; {adapter.converted_from} had the same values as a pickle"
            )
    verb = "would restore" if dry_run else "restored"
    total = counted(len(report.adapters), "adapter")
    sources = f"{exact} byte for byte, {len(done) - exact} from codes"
    out.line(f"{verb} {len(done)} of {total}: {sources}; {human_size(report.size)}")


def _tell_refused(out: Output, refused: list[AdapterRestored]) -> None:
    for adapter in refused:
        where = _shown(adapter.path)
        if out.is_quiet:
            out.warn(f"{where}: {adapter.reason}")
        out.line(f"not restored, {where}: {adapter.reason}")
    for hint in dict.fromkeys(adapter.hint for adapter in refused if adapter.hint is not None):
        out.hint(hint)


def _cells(adapter: AdapterRestored) -> list[str]:
    source = "was still there" if adapter.status == "complete" else _FROM[adapter.source or "original"]
    lossy = adapter.source != "original"
    error, gain = (adapter.relative_error, adapter.retained_gain) if lossy else (None, None)
    numbers = ["-" if error is None else f"{error:.4f}", gain_text(gain, adapter.precision, 4)]
    return [_shown(adapter.path), adapter.task or "-", source, human_size(adapter.size), *numbers]


def _shown(path: str) -> str:
    """Return a path as the user would write it: from the current folder where it is inside."""
    return path.removeprefix(f"{os.getcwd()}{os.sep}")
