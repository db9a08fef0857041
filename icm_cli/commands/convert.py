"""`icm convert`: convert adapters to another format, or shrink them, without a store."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from icm_cli.command import plain_command as command
from icm_cli.errors import UsageProblem
from icm_cli.options import DtypeName, argument, option
from icm_cli.output import Column, Field, Output
from icm_cli.session import Session, end
from icm_cli.text import as_fields, figure
from icmlora.errors import Cancelled
from icmlora.io.text import counted, human_size, parse_bytes

if TYPE_CHECKING:
    from icmlora.fleet.context import Event
    from icmlora.fleet.convert.convert import AdapterConverted, ConvertReport

SourceArg = Annotated[Path | None, argument("SRC", "Folder or file of an adapter, or a folder of several adapters.")]
DestinationArg = Annotated[
    Path | None,
    argument("DST", "Output folder or file, depending on the format. For several adapters: their parent folder."),
]
FormatOpt = Annotated[
    str | None,
    option(
        "--format NAME",
        "Output format: peft, mlx (for MLX-LM), gguf (one file for llama.cpp), diffusers, kohya, comfyui, xlabs "
        "or lycoris. See --list-formats for valid conversions. Default: the format of SRC.",
        completes="format",
    ),
]
RankOpt = Annotated[
    int | None,
    option(
        "--rank N",
        "Reduce every module to at most rank N. LoHa, LoKr and full LyCORIS differences become LoRA of rank N.",
        min=1,
    ),
]
SizeOpt = Annotated[
    str | None,
    option(
        "--size SIZE", "Maximum size of the weights file, such as 4MB. Module ranks are chosen to minimise the error."
    ),
]
DtypeOpt = Annotated[
    DtypeName | None,
    option("--dtype", "Number format of the weights. Default: as in SRC, or float32 for gguf and mlx."),
]
BaseOpt = Annotated[
    Path | None,
    option(
        "--base-model PATH",
        "Folder or GGUF file of the base model. Its configuration is needed to read and write gguf. Default: the "
        "model named in the adapter, if it is on this machine.",
    ),
]
ListOpt = Annotated[
    bool,
    option(
        "--list-formats",
        "List the formats and their valid sources, and exit. Converting image adapters needs the extra "
        "`diffusion`; gguf needs the configuration of the base model.",
    ),
]
ForceOpt = Annotated[bool, option("--force -f", "Overwrite DST, unless it is SRC.")]

_FIELDS: tuple[Field[AdapterConverted], ...] = (
    Field("adapter", lambda done: done.name, shrink=True),
    Field("format", lambda done: done.format),
    Field("rank", lambda done: str(done.rank), right=True),
    Field("before", lambda done: human_size(done.before), right=True),
    Field("after", lambda done: human_size(done.size), right=True),
    Field("relative error", lambda done: figure(done.relative_error), right=True),
)


@command
def convert(
    session: Session,
    source: SourceArg = None,
    destination: DestinationArg = None,
    adapter_format: FormatOpt = None,
    rank: RankOpt = None,
    size: SizeOpt = None,
    dtype: DtypeOpt = None,
    base_model: BaseOpt = None,
    force: ForceOpt = False,
    list_formats: ListOpt = False,
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
    if list_formats:
        _show_formats(session)
        return
    if source is None or destination is None:
        raise UsageProblem("SRC and DST are required", hint="run `icm convert SRC DST --format NAME`")
    from icmlora.fleet.convert import convert as use_case

    stopped = False
    try:
        with session.listening("convert", lambda event: _print_event(session.out, event)) as listen:
            report = use_case.convert(
                source,
                destination,
                adapter_format=adapter_format,
                rank=rank,
                size=None if size is None else parse_bytes(size),
                dtype=dtype,
                base_model=base_model,
                force=force,
                on_event=listen,
            )
    except Cancelled as stop:
        if not isinstance(stop.report, use_case.ConvertReport):
            raise
        report, stopped = stop.report, True
    _sum_up(session.out, report)
    hint = "convert the remaining adapters, or run the same command with --force"
    done = f"converted {counted(len(report.adapters), 'adapter')}"
    end(done, stopped=stopped, partly=bool(report.failed), hint=hint)


def _show_formats(session: Session) -> None:
    """Print the adapter formats and the valid source formats of each."""
    from icmlora.fleet.write.format_pairs import written_from
    from icmlora.formats import catalogue

    found = [(known.name, known.about, list(written_from(known))) for known in catalogue.FORMATS]
    session.out.document(
        [
            {"name": name, "about": about, "read": True, "written_from": sources, "code": True}
            for name, about, sources in found
        ]
    )
    session.out.names(name for name, _, _ in found)
    columns = [Column("format"), Column("description", shrink=True), Column("read")]
    columns += [Column("written from", shrink=True), Column("code")]
    session.out.table(columns, [(name, about, "yes", ", ".join(sources), "yes") for name, about, sources in found])


def _print_event(out: Output, event: Event) -> None:
    from icmlora.fleet.context import TaskFailed
    from icmlora.fleet.convert.convert import AdapterConverted

    if isinstance(event, AdapterConverted):
        out.event("adapter", **as_fields(event))
    elif isinstance(event, TaskFailed):
        out.event("failed", name=event.task, kind=event.kind, message=event.message, hint=event.hint)


def _sum_up(out: Output, report: ConvertReport) -> None:
    before, after = (sum(getattr(one, name) for one in report.adapters) for name in ("before", "size"))
    out.event("summary", adapters=len(report.adapters), failed=len(report.failed), before=before, size=after)
    out.names(adapter.output for adapter in report.adapters)
    out.listing(_FIELDS, report.adapters)
    for failed in report.failed:
        out.warn(f"{failed.task}: {failed.message}", kind=failed.kind, hint=failed.hint)
    left_out = sorted({file for adapter in report.adapters for file in adapter.left_out})
    if left_out:
        out.note(f"skipped files that the format cannot contain: {', '.join(left_out)}")
    failed_text = f"; {len(report.failed)} failed" if report.failed else ""
    where = f" to {report.adapters[0].output}" if len(report.adapters) == 1 else ""
    adapters = counted(len(report.adapters), "adapter")
    out.line(f"wrote {adapters}{where}: {human_size(after)}, {human_size(before)} before{failed_text}")
