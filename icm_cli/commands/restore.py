"""`icm restore`: replace placeholders with their adapters."""

from __future__ import annotations

from typing import TYPE_CHECKING

from icm_cli.command import Call, command
from icm_cli.errors import ExitCode
from icm_cli.output import Field, Output
from icm_cli.report import end
from icm_cli.session import Session
from icm_cli.text import figure, path_shown
from icmlora.fleet.evict import restore as restoring
from icmlora.fleet.evict.restore import AdapterRestored, RestoreReport
from icmlora.fleet.measure.metric_result import gain_text
from icmlora.io.text import counted, human_size

if TYPE_CHECKING:
    from icmlora.fleet.context import Event

_FIELDS: tuple[Field[AdapterRestored], ...] = (
    Field("folder", lambda adapter: path_shown(adapter.path), shrink=True),
    Field("task", lambda adapter: adapter.task or "-", shrink=True),
    Field("from", lambda adapter: "already present" if adapter.status == "complete" else adapter.source or "original"),
    Field("size", lambda adapter: human_size(adapter.size), right=True),
    # An original loses nothing.
    Field("relative error", lambda it: "-" if it.source == "original" else figure(it.relative_error), right=True),
    Field(
        "retained gain",
        lambda it: "-" if it.source == "original" else gain_text(it.retained_gain, it.precision, 4),
        right=True,
    ),
)


@command(restoring.restore)
def restore(session: Session, call: Call[RestoreReport]) -> None:
    refused: list[AdapterRestored] = []

    def on_event(event: Event) -> None:
        if isinstance(event, AdapterRestored) and event.status == "refused":
            refused.append(event)

    out = session.out
    try:
        report = call.run(on_event)
    except Exception:
        if len(refused) > 1:  # the error message covers a single refusal
            _print_refused(out, refused)
        raise
    done = report.done
    exact = sum(adapter.source == "original" for adapter in done)
    out.event(
        "summary",
        dry_run=call["dry_run"],
        restored=len(done),
        exact=exact,
        from_codes=len(done) - exact,
        refused=len(report.refused),
        size=report.size,
    )
    out.names(adapter.path for adapter in done)
    if done or refused:
        out.listing(_FIELDS, done)
        _print_refused(out, refused)
        for adapter in done:
            if (name := adapter.converted_from) is not None:
                out.note(f"{adapter.task}: wrote safetensors with the values of {name}, which was a pickle")
        verb, total = "would restore" if call["dry_run"] else "restored", counted(len(done) + len(refused), "adapter")
        sources = f"{exact} byte for byte, {len(done) - exact} from codes"
        out.line(f"{verb} {len(done)} of {total}: {sources}; {human_size(report.size)}")
    else:
        out.line("found no placeholders")
    code = ExitCode.NO_SPACE if report.is_full else ExitCode.PARTLY
    end(report, f"restored {counted(len(done), 'adapter')}", code=code)


def _print_refused(out: Output, refused: list[AdapterRestored]) -> None:
    for adapter in refused:
        where = path_shown(adapter.path)
        if out.is_quiet:
            out.warn(f"{where}: {adapter.reason}")
        out.line(f"skipped {where}: {adapter.reason}")
    for hint in dict.fromkeys(adapter.hint for adapter in refused if adapter.hint is not None):
        out.hint(hint)
