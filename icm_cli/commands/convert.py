"""`icm convert`: adapters in another format, or smaller, without a store."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from icm_cli.errors import UsageProblem
from icm_cli.options import DtypeName, argument, option
from icm_cli.output import Column, Field, Output
from icm_cli.session import Session, command, end
from icm_cli.text import as_fields, figure
from icmlora.errors import Cancelled
from icmlora.io.text import counted, human_size, parse_bytes

if TYPE_CHECKING:
    from icmlora.fleet.context import Event
    from icmlora.fleet.convert.convert import AdapterConverted, ConvertReport

SourceArg = Annotated[Path | None, argument("SRC", "A folder or file of one adapter, or a folder of many.")]
DestinationArg = Annotated[
    Path | None,
    argument("DST", "Folder or file to write, as the format has it. For many adapters: the folder for them."),
]
FormatOpt = Annotated[
    str | None,
    option(
        "--format NAME",
        "Format to write: peft, mlx (for MLX-LM), gguf (one file for llama.cpp), diffusers, kohya, comfyui, xlabs "
        "or lycoris; --list-formats lists which becomes which. Default: that of the source.",
        completes="format",
    ),
]
RankOpt = Annotated[
    int | None,
    option(
        "--rank N",
        "Cut every module to rank N at most. LoHa, LoKr and whole differences of LyCORIS become LoRA of rank N.",
        min=1,
    ),
]
SizeOpt = Annotated[
    str | None,
    option(
        "--size SIZE", "Most bytes of the file of weights, as 4MB. Modules keep the ranks that make the error smallest."
    ),
]
DtypeOpt = Annotated[
    DtypeName | None,
    option(
        "--dtype", "Number format of the weights. Default: that of the source, or float32 with --format gguf or mlx."
    ),
]
BaseOpt = Annotated[
    Path | None,
    option(
        "--base-model PATH",
        "Folder or GGUF file of the base model, whose configuration is needed from and to gguf. Default: the "
        "model that the adapter names, if it is on this machine.",
    ),
]
ListOpt = Annotated[
    bool,
    option(
        "--list-formats",
        "Convert nothing: list the formats, and from which ones each is written. Image adapters need the extra "
        "`diffusion` for it, gguf the configuration of the base model.",
    ),
]
ForceOpt = Annotated[bool, option("--force -f", "Replace what is at DST, unless that is SRC itself.")]

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
    """Write an adapter in another format, or make it smaller. No store is needed.

    Ranks are cut by singular values, with the smallest error that the rank or the size allows. The relative error,
    ||dW' - dW|| / ||dW||, is measured on what was written. An adapter that keeps its format keeps its header, and heads
    and other tensors exactly; another format refuses, by name, what it has no place for. Image adapters get other names
    by diffusers' own converters (extra `diffusion`).

    Of a folder of many adapters, each goes into DST under its name. Exit code 3 means that some could not be converted.

    Example:
      icm convert dog-detection smaller/ --size 4MB
      icm convert loras/ loras-mlx/ --format mlx
      icm convert dog.safetensors dog-diffusers.safetensors --format diffusers
    """
    if list_formats:
        show_formats(session)
        return
    if source is None or destination is None:
        raise UsageProblem("SRC and DST are needed", hint="icm convert SRC DST --format NAME")
    from icmlora.fleet.convert import convert as use_case

    stopped = False
    try:
        with session.listening("convert", lambda event: _tell(session.out, event)) as listen:
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
    done, rest = counted(len(report.adapters), "adapter"), "convert the rest, or run it again with --force"
    end(f"{done} converted", stopped=stopped, partly=bool(report.failed), hint=rest)


def show_formats(session: Session) -> None:
    """Print which formats `icm ingest` reads, which `icm materialize` and `icm convert` write, and from which."""
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
    columns = [Column("format"), Column("what it is", shrink=True), Column("read")]
    columns += [Column("written from", shrink=True), Column("code")]
    session.out.table(columns, [(name, about, "yes", ", ".join(sources), "yes") for name, about, sources in found])


def _tell(out: Output, event: Event) -> None:
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
        out.note(f"without files that have no place in the format: {', '.join(left_out)}")
    some = f"; {len(report.failed)} not converted" if report.failed else ""
    where = f", in {report.adapters[0].output}" if len(report.adapters) == 1 else ""
    what = counted(len(report.adapters), "adapter")
    out.line(f"wrote {what}{where}: {human_size(after)}, {human_size(before)} before{some}")
