"""Convert adapters from one format into another, and make them smaller, without a store.

    SRC  one adapter: a folder or a file   ──▶  DST
         a folder of several               ──▶  DST/NAME of each; failures are reported

An adapter is written completely or not at all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from icmlora.base_models.finding.lookup import find_base_model, inspect_base
from icmlora.errors import AdapterRefused, BaseModelNotFound, Cancelled, DataError, OptionsConflict, located
from icmlora.fleet.context import Event, Progress, TaskFailed, ignore, reporting
from icmlora.fleet.params import DtypeName, Param
from icmlora.fleet.results import Report
from icmlora.fleet.write.format_pairs import OutputFormat, SourceAdapter, check_pair, format_to_write
from icmlora.formats import catalogue
from icmlora.formats.discovery.discovery import find_adapters
from icmlora.formats.discovery.tree import Folder
from icmlora.formats.format import AdapterBytes, FoundAdapter, check_target, replaces, write_adapter_files
from icmlora.formats.weights import read_weights
from icmlora.io.files import read_regular
from icmlora.io.text import parse_bytes
from registry.errors import IcmError

if TYPE_CHECKING:
    from icmlora.base_models.finding.lookup import FoundBase
    from icmlora.fleet.convert.resized_files import Wanted

_MAX_CONFIG_BYTES, _MAX_COMPANION_BYTES = 1 << 20, 4 << 30

SRC = Param("Folder or file of an adapter, or a folder of several adapters.", "SRC")
DST = Param("Output folder or file, depending on the format. For several adapters: their parent folder.", "DST")
Rank = Annotated[
    int | None,
    Param(
        "Reduce every module to at most rank N. LoHa, LoKr and full LyCORIS differences become LoRA of rank N.",
        "--rank N",
        min=1,
    ),
]
FileSize = Annotated[
    int | None,
    Param(
        "Maximum size of the weights file, such as 4MB. Module ranks are chosen to minimise the error.",
        "--size SIZE",
        parse=parse_bytes,
    ),
]
Dtype = Annotated[
    DtypeName | None,
    Param("Number format of the weights. Default: as in SRC, or float32 for gguf and mlx."),
]
BasePath = Annotated[
    str | Path | None,
    Param(
        "Folder or GGUF file of the base model. Its configuration is needed to read and write gguf. Default: the "
        "model named in the adapter, if it is on this machine.",
        "--base-model PATH",
    ),
]
Overwrite = Annotated[bool, Param("Overwrite DST, unless it is SRC.", "--force -f")]


@dataclass(frozen=True)
class AdapterConverted(Event):
    """One adapter is written."""

    TYPE = "adapter"

    name: str
    source: str  # its folder or file
    output: str  # the written folder or file
    from_format: str
    format: str
    before: int  # bytes of the weights of the source
    size: int  # bytes of the written weights
    rank: int  # the largest of a module
    relative_error: float  # ||dW' - dW|| / ||dW||
    kinds: dict[str, float] | None  # the same of each group of modules; None if nothing changed
    left_out: tuple[str, ...]  # files of the source that the format cannot include


def convert(
    source: Annotated[str | Path, SRC],
    destination: Annotated[str | Path, DST],
    *,
    adapter_format: OutputFormat = None,
    rank: Rank = None,
    size: FileSize = None,
    dtype: Dtype = None,
    base_model: BasePath = None,
    force: Overwrite = False,
    on_event: Callable[[Event], None] = ignore,
) -> Report[AdapterConverted]:
    """Convert adapters to another format or a smaller size; no store is needed.

    `icm convert --help` explains the arguments. `on_event` is called with `Progress`, and with `AdapterConverted` and
    `TaskFailed` once an adapter is done. An adapter that needs no change keeps its bytes.

    Returns:
        `done` has one entry for each written adapter. `failed` lists failures, if there are several sources.

    Raises:
        AdapterRefused: The only source is no adapter, is damaged, or has parts that the format cannot represent.
        DataError: The arguments contradict each other, the destination does not fit or is the source itself, or an
            extra is not installed.
        OutputExists: Something is at the destination, and `force` is not given.
    """
    from icmlora.fleet.convert.resized_files import Wanted
    from icmlora.io.tensors import DTYPE_NAMES

    target = None if adapter_format is None else format_to_write(adapter_format)
    if dtype is not None and dtype not in DTYPE_NAMES:
        raise DataError(f"unknown number format {dtype!r}", hint=f"choose one of {', '.join(DTYPE_NAMES)}")
    if rank is not None and size is not None:
        fact = "--size sets the ranks itself, so it cannot be used with --rank"
        raise OptionsConflict(fact, hint="use one of the two")
    if any(value is not None and value < 1 for value in (rank, size)):
        fact = "a rank or a size must be a positive whole number"
        raise DataError(fact, hint="use a value such as rank 8 or size 4000000")
    if adapter_format is None and rank is None and size is None and dtype is None:
        raise OptionsConflict("nothing would change", hint="add --format, --rank, --size or --dtype")
    wanted = Wanted(target, rank, size, dtype)
    path, output, report = Path(source), Path(destination), Report[AdapterConverted]()
    if (one := _single(path)) is not None:
        on_event(Progress(0, 1, one.place.name))
        report.done.append(_convert_one(one.place.name, one, output, wanted, base_model, force=force))
        on_event(report.done[-1])
        return report
    discovery = find_adapters([path], texts=False)
    if not discovery.tasks:
        for refusal in discovery.refused:
            raise refusal
        hint = "specify the folder or file of an adapter, or a folder of adapters"
        raise AdapterRefused("there is no adapter in this folder", kind="empty", path=path, hint=hint)
    with reporting(report):
        for error in discovery.refused:
            report.failed.append(TaskFailed.of(error.path or str(path), error))
            on_event(report.failed[-1])
        for number, task in enumerate(discovery.tasks):
            on_event(Progress(number, len(discovery.tasks), task.name))
            place = output / f"{task.name}{(target or task.final.format).suffix or ''}"
            try:
                report.done.append(_convert_one(task.name, task.final, place, wanted, base_model, force=force))
                on_event(report.done[-1])
            except Cancelled:
                raise
            except IcmError as error:
                report.failed.append(TaskFailed.of(task.name, error))
                on_event(report.failed[-1])
        on_event(Progress(len(discovery.tasks), len(discovery.tasks)))
    return report


def _single(path: Path) -> FoundAdapter | None:
    """Return the adapter whose file or folder is at a path; None if the path is another folder."""
    if not path.exists():
        raise AdapterRefused("does not exist", kind="not-a-folder", path=path)
    folder = path if path.is_dir() else path.parent
    entries = {entry.name: entry for entry in folder.iterdir() if entry.is_file()}
    if folder != path:
        entries = {name: entry for name, entry in entries.items() if name.startswith(f"{path.stem}.")}
    # The first format that knows a file has it.
    adapters = [one for known in catalogue.FORMATS for one in known.find(Folder(folder, entries))]
    found = next((one for one in adapters if path == (one.place if folder == path else one.weights)), None)
    if found is None and folder != path:
        hint = "run `icm convert --list-formats` to list the supported formats"
        raise AdapterRefused("is not an adapter", kind="empty", path=path, hint=hint)
    return found


def _convert_one(
    name: str, found: FoundAdapter, output: Path, wanted: Wanted, base_model: str | Path | None, *, force: bool
) -> AdapterConverted:
    """Write one adapter as a folder, or as a file."""
    from icmlora.fleet.convert.resized_files import convert_files

    known, target = found.format, wanted.adapter_format or found.format
    place = found.weights if found.config is None else found.place  # as a user names it
    if known.name != "lycoris":  # its tensors decide the possible formats
        with located(place):
            check_pair(known, target)
    check_target(output, target, force=force)
    content = AdapterBytes(
        read_weights(found.weights, known),
        b"" if found.config is None else read_regular(found.config, max_bytes=_MAX_CONFIG_BYTES),
        None if found.card is None else read_regular(found.card, max_bytes=_MAX_COMPANION_BYTES),
        {file: read_regular(path, max_bytes=_MAX_COMPANION_BYTES) for file, path in found.companions.items()},
    )

    def find_base() -> FoundBase:

        label = known.inspect(content.config, content.weights).base_model or ""
        try:
            return find_base_model(label) if base_model is None else inspect_base(label, Path(base_model))
        except BaseModelNotFound as error:
            error.hint = "specify its folder or GGUF file with --base-model PATH"
            raise

    made = convert_files(SourceAdapter(name, known, content, find_base, path=place), wanted)
    if force and (own := replaces(output, made.format, made.content, name, found.files)):
        hint = "write to another path, then replace the source if you no longer need it"
        raise DataError("the output would overwrite the source", path=own, hint=hint)
    write_adapter_files(output, made.format, made.content, name, force=force)
    written = made.format.lay_out(made.content, name).values()
    others = dict(content.companions) if content.card is None else {**content.companions, "README.md": content.card}
    return AdapterConverted(
        name=name,
        source=str(place),
        output=str(output),
        from_format=known.name,
        format=made.format.name,
        before=len(content.weights),
        size=len(made.content.weights),
        rank=made.rank,
        relative_error=made.relative_error,
        kinds=made.groups,
        left_out=tuple(file for file, data in others.items() if data not in written),
    )
