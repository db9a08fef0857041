"""`icm restore`: replace placeholders with their adapters."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from icm_cli.command import plain_command as command
from icm_cli.errors import ExitCode
from icm_cli.options import DryRunOpt, FromOpt, argument
from icm_cli.output import Field, Output
from icm_cli.session import Session, end
from icm_cli.text import as_fields, figure, path_shown
from icmlora.fleet.measure.metric_result import gain_text
from icmlora.io.text import counted, human_size

if TYPE_CHECKING:
    from icmlora.fleet.context import Event
    from icmlora.fleet.evict.restore import AdapterRestored, RestoreReport

FoldersArg = Annotated[list[Path], argument("FOLDER...", "Folders that contain placeholders at any depth.")]

_FIELDS: tuple[Field[AdapterRestored], ...] = (
    Field("folder", lambda adapter: path_shown(adapter.path), shrink=True),
    Field("task", lambda adapter: adapter.task or "-", shrink=True),
    Field("from", lambda adapter: _source(adapter)),
    Field("size", lambda adapter: human_size(adapter.size), right=True),
    Field("relative error", lambda adapter: figure(_lost(adapter, adapter.relative_error)), right=True),
    Field(
        "retained gain",
        lambda adapter: gain_text(_lost(adapter, adapter.retained_gain), adapter.precision, 4),
        right=True,
    ),
)


@command
def restore(session: Session, folders: FoldersArg, bundle: FromOpt = None, dry_run: DryRunOpt = False) -> None:
    """Replace placeholders of `icm evict --placeholder` with their adapters.

    If the store still has the original, the adapter is restored byte for byte. Otherwise it is decoded from its code,
    in the original's format, and the table shows the loss. With --from, codes are read from a bundle and no store is
    needed. Existing files are never overwritten. A placeholder is deleted only once its adapter is complete.

    If some adapters cannot be restored, they are listed and the exit code is 3, or 15 if the disk is full.

    icm uses the store given by --store, and ignores the store recorded in a placeholder.

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
            lambda event: _collect(session, refused, event),
        )
    except Exception:
        if len(refused) > 1:  # the error message covers a single refusal
            _print_refused(session.out, refused)
        raise
    _sum_up(session.out, report, dry_run=dry_run)
    code = ExitCode.NO_SPACE if report.is_full else ExitCode.PARTLY
    end(f"restored {counted(len(report.restored), 'adapter')}", stopped=stopped, partly=bool(report.refused), code=code)


def _collect(session: Session, refused: list[AdapterRestored], event: Event) -> None:
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
    out.names(adapter.path for adapter in done)
    if not report.adapters:
        out.line("found no placeholders")
        return
    out.listing(_FIELDS, done)
    _print_refused(out, report.refused)
    for adapter in done:
        if adapter.converted_from is not None:
            out.note(
                f"{adapter.task}: wrote safetensors with the values of {adapter.converted_from}, which was a pickle"
            )
    verb = "would restore" if dry_run else "restored"
    total = counted(len(report.adapters), "adapter")
    sources = f"{exact} byte for byte, {len(done) - exact} from codes"
    out.line(f"{verb} {len(done)} of {total}: {sources}; {human_size(report.size)}")


def _print_refused(out: Output, refused: list[AdapterRestored]) -> None:
    for adapter in refused:
        where = path_shown(adapter.path)
        if out.is_quiet:
            out.warn(f"{where}: {adapter.reason}")
        out.line(f"skipped {where}: {adapter.reason}")
    for hint in dict.fromkeys(adapter.hint for adapter in refused if adapter.hint is not None):
        out.hint(hint)


def _source(adapter: AdapterRestored) -> str:
    return "already present" if adapter.status == "complete" else adapter.source or "original"


def _lost(adapter: AdapterRestored, figure: float | None) -> float | None:
    """Return a loss figure, or None for an original, which loses nothing."""
    return None if adapter.source == "original" else figure
