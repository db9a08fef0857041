"""Convert adapters from one format into another, and make them smaller, without a store.

    SRC  one adapter: a folder or a file   ──▶  DST
         a folder of many                  ──▶  DST/NAME of each; what cannot be converted is reported

An adapter is written completely or not at all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from icmlora.errors import AdapterRefused, BaseModelNotFound, Cancelled, DataError, OptionsConflict, located
from icmlora.fleet.context import Event, Progress, TaskFailed, ignore, reporting
from icmlora.fleet.write.format_pairs import SourceAdapter, check_pair, format_to_write
from icmlora.formats import catalogue
from icmlora.formats.discovery.discovery import find_adapters
from icmlora.formats.discovery.tree import Folder
from icmlora.formats.format import (
    AdapterBytes,
    FoundAdapter,
    check_target,
    replaces,
    write_adapter_files,
)
from icmlora.formats.weights import read_weights
from icmlora.io.files import read_regular
from registry.errors import IcmError

if TYPE_CHECKING:
    from icmlora.base_models.finding.lookup import FoundBase
    from icmlora.fleet.convert.resized_files import ConvertedFiles, Wanted

_CONFIG_LIMIT, _COMPANION_LIMIT = 1 << 20, 4 << 30


@dataclass(frozen=True)
class AdapterConverted(Event):
    """One adapter is written."""

    name: str
    source: str  # the folder or file that it came from
    output: str  # the folder or file that was written
    from_format: str
    format: str
    before: int  # bytes of the source's file of weights
    size: int  # bytes of the written one
    rank: int  # the largest of a module
    relative_error: float  # ||dW' - dW|| / ||dW||
    kinds: dict[str, float] | None  # the same of each group of modules; None if nothing changed
    left_out: tuple[str, ...]  # files that came with it and have no place in the format


@dataclass
class ConvertReport:
    """What was written, and what was not."""

    adapters: list[AdapterConverted] = field(default_factory=list)
    failed: list[TaskFailed] = field(default_factory=list)


@dataclass(frozen=True)
class _OnDisk:
    """An adapter on disk."""

    name: str
    paths: FoundAdapter

    def read(self, base_model: Path | None) -> SourceAdapter:
        paths = self.paths
        config = b"" if paths.config is None else read_regular(paths.config, max_bytes=_CONFIG_LIMIT)
        card = None if paths.card is None else read_regular(paths.card, max_bytes=_COMPANION_LIMIT)
        companions = {name: read_regular(path, max_bytes=_COMPANION_LIMIT) for name, path in paths.companions.items()}
        weights = read_weights(paths.weights, paths.format)
        content = AdapterBytes(weights, config, card, companions)

        def find_base() -> FoundBase:
            from icmlora.base_models.finding.lookup import find_base_model, inspect_base

            label = paths.format.inspect(config, weights).base_model or ""
            try:
                return find_base_model(label) if base_model is None else inspect_base(label, base_model)
            except BaseModelNotFound as error:
                error.hint = "specify its folder or GGUF file with --base-model PATH"
                raise

        return SourceAdapter(self.name, paths.format, content, find_base, path=self.place)

    @property
    def place(self) -> Path:
        """What a user calls the adapter: its folder, or its file."""
        return self.paths.weights if self.paths.config is None else self.paths.place


def convert(
    source: str | Path,
    destination: str | Path,
    *,
    adapter_format: str | None = None,
    rank: int | None = None,
    size: int | None = None,
    dtype: str | None = None,
    base_model: str | Path | None = None,
    force: bool = False,
    on_event: Callable[[Event], None] = ignore,
) -> ConvertReport:
    """Write an adapter, or each of a folder of them, in another format or smaller; no store is needed.

    Without a format it keeps its own, with its header and heads. One that needs no change keeps its bytes.

    Args:
        source: A folder with one adapter, a file, or a folder of many.
        destination: What to write, a folder or a file as the format has it; of many sources, the folder for them.
        adapter_format: Name of the format; by default that of the source.
        rank: Cut modules to this rank, with the smallest error. LoHa, LoKr and whole differences become LoRA of it.
        size: Most bytes of the file of weights: each module gets the rank that makes the whole error smallest.
        dtype: "bfloat16", "float16" or "float32"; by default that of the source, and float32 for `gguf` and `mlx`.
        base_model: Folder or GGUF file of the base model, whose configuration is needed from and to `gguf`.
        force: Replace what is at the destination, unless that is the source itself.
        on_event: Called with `Progress`, and with `AdapterConverted` and `TaskFailed` once an adapter is done.

    Returns:
        One entry for each adapter; `failed` lists those of many sources that could not be converted.

    Raises:
        AdapterRefused: The only source is no adapter, is damaged, or has something that the format has no place for.
        DataError: The arguments contradict each other, the destination does not fit or is the source itself, or an
            extra is not installed.
        OutputExists: Something is at the destination, and `force` is not given.
    """
    wanted, place = _wanted(adapter_format, rank, size, dtype), Path(destination)
    one, report = _single(Path(source)), ConvertReport()
    if one is not None:
        on_event(Progress(0, 1, one.name))
        report.adapters.append(_convert_one(one, place, wanted, base_model, force=force))
        on_event(report.adapters[0])
        return report
    found, refused = _many(Path(source))
    with reporting(report):
        for path, error in refused:
            report.failed.append(TaskFailed.of(path, error))
            on_event(report.failed[-1])
        for done, adapter in enumerate(found):
            on_event(Progress(done, len(found), adapter.name))
            try:
                output = place / f"{adapter.name}{(wanted.adapter_format or adapter.paths.format).suffix or ''}"
                report.adapters.append(_convert_one(adapter, output, wanted, base_model, force=force))
                on_event(report.adapters[-1])
            except Cancelled:
                raise
            except IcmError as error:
                report.failed.append(TaskFailed.of(adapter.name, error))
                on_event(report.failed[-1])
        on_event(Progress(len(found), len(found)))
    return report


def _wanted(adapter_format: str | None, rank: int | None, size: int | None, dtype: str | None) -> Wanted:
    from icmlora.fleet.convert.resized_files import Wanted
    from icmlora.io.tensors import DTYPE_NAMES

    target = None if adapter_format is None else format_to_write(adapter_format)
    if dtype is not None and dtype not in DTYPE_NAMES:
        raise DataError(f"unknown number format {dtype!r}", hint=f"choose one of {', '.join(DTYPE_NAMES)}")
    if rank is not None and size is not None:
        raise OptionsConflict(
            "--size sets the ranks itself, so it cannot be used with --rank", hint="use one of the two"
        )
    if (rank is not None and rank < 1) or (size is not None and size < 1):
        raise DataError(
            "a rank or a size must be a positive whole number", hint="use a value such as rank 8 or size 4000000"
        )
    if adapter_format is None and rank is None and size is None and dtype is None:
        raise OptionsConflict("nothing would change", hint="add --format, --rank, --size or --dtype")
    return Wanted(target, rank, size, dtype)


def _single(path: Path) -> _OnDisk | None:
    """Return the adapter if a path is that of one: its file, or its folder."""
    if not path.exists():
        raise AdapterRefused("does not exist", kind="not-a-folder", path=path)
    place = path if path.is_dir() else path.parent
    entries = {entry.name: entry for entry in place.iterdir() if entry.is_file()}
    if path.is_dir():
        found = [one for one in _at(Folder(path, entries)) if one.paths.place == path]
        return found[0] if found else None
    own = {name: entry for name, entry in entries.items() if name.startswith(f"{path.stem}.")}
    found = [one for one in _at(Folder(place, own)) if one.paths.weights == path]
    if not found:
        hint = "run `icm convert --list-formats` to list the supported formats"
        raise AdapterRefused("is not an adapter", kind="empty", path=path, hint=hint)
    return found[0]


def _at(folder: Folder) -> list[_OnDisk]:
    """Return the adapters of a folder; the first format that knows a file has it."""
    return [_OnDisk(paths.place.name, paths) for known in catalogue.FORMATS for paths in known.find(folder)]


def _many(path: Path) -> tuple[list[_OnDisk], Sequence[tuple[str, IcmError]]]:
    """Return the adapters under a folder by name, and what looks like one but cannot be read."""
    discovery = find_adapters([path], texts=False)
    found = [_OnDisk(task.name, task.final) for task in discovery.tasks]
    if not found:
        for refusal in discovery.refused:
            raise refusal
        hint = "specify the folder or file of an adapter, or a folder of adapters"
        raise AdapterRefused("there is no adapter in this folder", kind="empty", path=path, hint=hint)
    return found, [(error.path or str(path), error) for error in discovery.refused]


def _convert_one(
    found: _OnDisk, output: Path, wanted: Wanted, base_model: str | Path | None, *, force: bool
) -> AdapterConverted:
    """Write one adapter as a folder, or as a file."""
    from icmlora.fleet.convert.resized_files import convert_files

    target = wanted.adapter_format or found.paths.format
    if found.paths.format.name != "lycoris":  # whose tensors say what can be made of it
        with located(found.place):
            check_pair(found.paths.format, target)
    check_target(output, target, force=force)
    source = found.read(None if base_model is None else Path(base_model))
    made = convert_files(source, wanted)
    if force and (own := replaces(output, made.format, made.content, found.name, found.paths.files)):
        hint = "write to another path, then replace the source if you no longer need it"
        raise DataError("the output would overwrite the source", path=own, hint=hint)
    write_adapter_files(output, made.format, made.content, found.name, force=force)
    return _outcome(found, source.content, made, output)


def _outcome(found: _OnDisk, content: AdapterBytes, made: ConvertedFiles, output: Path) -> AdapterConverted:
    files = made.format.lay_out(made.content, found.name)
    others = dict(content.companions) if content.card is None else {**content.companions, "README.md": content.card}
    return AdapterConverted(
        name=found.name,
        source=str(found.place),
        output=str(output),
        from_format=found.paths.format.name,
        format=made.format.name,
        before=len(content.weights),
        size=len(made.content.weights),
        rank=made.rank,
        relative_error=made.relative_error,
        kinds=None if made.groups is None else dict(made.groups),
        left_out=tuple(file for file, data in others.items() if data not in files.values()),
    )
