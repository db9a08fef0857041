"""`icm convert`: convert adapters to another format, or shrink them, without a store."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from icm_cli.command import plain_command
from icm_cli.errors import UsageProblem
from icm_cli.output import Column, Field
from icm_cli.report import end
from icm_cli.session import Session
from icm_cli.text import as_fields, figure
from icmlora.errors import Cancelled
from icmlora.fleet.context import TaskFailed
from icmlora.fleet.convert import convert as use_case
from icmlora.fleet.convert.convert import AdapterConverted
from icmlora.fleet.params import Param
from icmlora.fleet.write.format_pairs import OutputFormat, written_from
from icmlora.formats import catalogue
from icmlora.io.text import counted, human_size

if TYPE_CHECKING:
    from icmlora.fleet.context import Event

_FIELDS: tuple[Field[AdapterConverted], ...] = (
    Field("adapter", lambda done: done.name, shrink=True),
    Field("format", lambda done: done.format),
    Field("rank", lambda done: str(done.rank), right=True),
    Field("before", lambda done: human_size(done.before), right=True),
    Field("after", lambda done: human_size(done.size), right=True),
    Field("relative error", lambda done: figure(done.relative_error), right=True),
)


@plain_command
def convert(
    session: Session,
    source: Annotated[Path | None, use_case.SRC] = None,
    destination: Annotated[Path | None, use_case.DST] = None,
    adapter_format: OutputFormat = None,
    rank: use_case.Rank = None,
    size: use_case.FileSize = None,
    dtype: use_case.Dtype = None,
    base_model: use_case.BasePath = None,
    force: use_case.Overwrite = False,
    list_formats: Annotated[
        bool,
        Param(
            "List the formats and their valid sources, and exit. Converting image adapters needs the extra "
            "`diffusion`; gguf needs the configuration of the base model."
        ),
    ] = False,
) -> None:
    """Convert adapters to another format or a smaller size.

    No store is needed. Ranks are reduced by singular value decomposition, with the smallest error for the given rank or
    size. The relative error ||dW' - dW|| / ||dW|| is measured on the written file. Within a format, the header and
    additional tensors such as heads are copied unchanged. Tensors that another format cannot represent are an error.

    For a folder of adapters, each is written to DST under its own name. Exit code 3 means that some conversions failed.

    Example:
      icm convert dog-detection smaller/ --size 4MB
      icm convert loras/ loras-mlx/ --format mlx
    """
    out = session.out
    if list_formats:
        _show_formats(session)
        return
    if source is None or destination is None:
        raise UsageProblem("SRC and DST are required", hint="run `icm convert SRC DST --format NAME`")

    def print_event(event: Event) -> None:
        if isinstance(event, AdapterConverted):
            out.event(event.TYPE, **as_fields(event))
        elif isinstance(event, TaskFailed):
            out.event("failed", name=event.task, kind=event.kind, message=event.message, hint=event.hint)

    try:
        with session.listening("convert", print_event) as listen:
            report = use_case.convert(
                source,
                destination,
                adapter_format=adapter_format,
                rank=rank,
                size=size,
                dtype=dtype,
                base_model=base_model,
                force=force,
                on_event=listen,
            )
    except Cancelled as stop:
        if stop.report is None:
            raise
        stopped: Any = stop.report
        report, stopped.stopped = stopped, True
    before, after = (sum(getattr(one, name) for one in report.done) for name in ("before", "size"))
    out.event("summary", adapters=len(report.done), failed=len(report.failed), before=before, size=after)
    out.names(adapter.output for adapter in report.done)
    out.listing(_FIELDS, report.done)
    for failed in report.failed:
        out.warn(f"{failed.task}: {failed.message}", kind=failed.kind, hint=failed.hint)
    left_out = sorted({file for adapter in report.done for file in adapter.left_out})
    if left_out:
        out.note(f"skipped files that the format cannot contain: {', '.join(left_out)}")
    failed_text = f"; {len(report.failed)} failed" if report.failed else ""
    where = f" to {report.done[0].output}" if len(report.done) == 1 else ""
    adapters = counted(len(report.done), "adapter")
    out.line(f"wrote {adapters}{where}: {human_size(after)}, {human_size(before)} before{failed_text}")
    hint = "convert the remaining adapters, or run the same command with --force"
    end(report, f"converted {adapters}", hint=hint)


def _show_formats(session: Session) -> None:
    """Print the adapter formats and the valid source formats of each."""
    rows: list[dict[str, Any]] = [
        {"name": known.name, "about": known.about, "read": True, "written_from": [*written_from(known)], "code": True}
        for known in catalogue.FORMATS
    ]
    session.out.document(rows)
    session.out.names(row["name"] for row in rows)
    columns = [Column("format"), Column("description", shrink=True), Column("read")]
    columns += [Column("written from", shrink=True), Column("code")]
    texts = [[row["name"], row["about"], "yes", ", ".join(row["written_from"]), "yes"] for row in rows]
    session.out.table(columns, texts)
