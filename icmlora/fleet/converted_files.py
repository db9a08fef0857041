"""Make the files of one adapter in another format, with other ranks, or in another number format.

    the same format    written in its own form: names, header, heads and all else stay       Template
    gguf, mlx          what it does to its base model, written for a program                  RunnableAdapter
    another format     its LoRA factors alone; anything else is refused by name               Adapter

A size is met by cutting the slots that matter least (icmlora/adapter/resize.py). How many bytes a header takes is known
when it is written, so that takes a few tries.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from icmlora.adapter.arithmetic import truncated
from icmlora.adapter.model import Adapter
from icmlora.adapter.resize import Slots, relative_errors
from icmlora.errors import AdapterRefused, BaseModelNotFound, located
from icmlora.fleet.converting import gguf_base, read_converted
from icmlora.formats.catalogue import format_named
from icmlora.formats.diffusers import METADATA
from icmlora.formats.format import AdapterBytes, AdapterFormat, AdapterSummary, RunnableAdapter, Template
from icmlora.formats.single_file_check import HEADER
from icmlora.io.safetensors import ITEM_BYTES, header_text, parse_header
from icmlora.io.tensors import DTYPE_NAMES, dtype_name

if TYPE_CHECKING:
    from icmlora.formats.gguf_lora import GgufBase

PROGRAMS = ("gguf", "mlx")
"""Formats of programs, which hold less than an adapter may be; see icmlora/fleet/converting.py."""
_ONE_RANK = ("mlx",)
"""Formats that state one rank for all modules."""
_GUESSES = 6
"""Tries in which the bytes of a header are taken from the try before; then the range is halved."""


@dataclass(frozen=True, eq=False)
class SourceAdapter:
    """An adapter that was read from disk."""

    name: str
    path: Path
    format: AdapterFormat
    content: AdapterBytes

    @property
    def summary(self) -> AdapterSummary:
        """What it is; raises as `AdapterFormat.inspect` does."""
        return self.format.inspect(self.content.config, self.content.weights, path=self.path)


@dataclass(frozen=True)
class Wanted:
    """What is to become of an adapter; None for what stays as it is.

    Attributes:
        adapter_format: Name of the format.
        rank: Largest rank of a module.
        size: Most bytes of the file of weights.
        dtype: "bfloat16", "float16" or "float32".
        base_model: Folder or GGUF file of the base model, for `gguf`.
    """

    adapter_format: str | None = None
    rank: int | None = None
    size: int | None = None
    dtype: str | None = None
    base_model: Path | None = None


@dataclass(frozen=True, eq=False)
class ConvertedFiles:
    """An adapter as the files of a format.

    Attributes:
        content: Its files.
        rank: The largest rank of a module.
        relative_error: ||dW' - dW|| / ||dW|| of what was written; None if it was not measured.
        kinds: The same of each kind of modules, such as `q_proj`.
    """

    content: AdapterBytes
    rank: int
    relative_error: float | None = 0.0
    kinds: Mapping[str, float] | None = None


@dataclass(frozen=True, eq=False)
class _Writer:
    """How adapters are written; `read` reads them again, where that gives the names of the source."""

    original: Adapter
    write: Callable[[Adapter], AdapterBytes]
    item: int  # bytes of a value
    read: Callable[[AdapterBytes], Adapter] | None


def convert_files(source: SourceAdapter, wanted: Wanted) -> ConvertedFiles:
    """Make the files of an adapter; what needs no change keeps its bytes.

    Raises:
        AdapterRefused: It is damaged, more than the format has a place for, or cannot be made so small.
        BaseModelNotFound: A GGUF adapter needs the configuration of its base model.
    """
    summary = source.summary
    is_same = wanted.adapter_format in (None, source.format.name)
    fits = wanted.size is None or len(source.content.weights) <= wanted.size
    is_typed = wanted.dtype is None or DTYPE_NAMES.get(wanted.dtype) == summary.dtype
    if is_same and is_typed and fits and (wanted.rank is None or summary.rank_max <= wanted.rank):
        return ConvertedFiles(source.content, summary.rank_max)
    writer = (_in_form if is_same else _for_program if wanted.adapter_format in PROGRAMS else _fresh)(
        source, summary, wanted
    )
    adapter = writer.original
    if wanted.rank is not None and summary.rank_max > wanted.rank:
        adapter = truncated(adapter, wanted.rank)
    content = writer.write(adapter)
    if wanted.size is not None and len(content.weights) > wanted.size:
        adapter, content = _largest(
            writer, wanted.size, one_rank=(wanted.adapter_format or source.format.name) in _ONE_RANK
        )
    found, kinds = _errors(writer, adapter, content, wanted.dtype)
    return ConvertedFiles(content, max(shape.rank for shape in adapter.layout), found, kinds)


def _in_form(source: SourceAdapter, summary: AdapterSummary, wanted: Wanted) -> _Writer:
    known, content = source.format, source.content
    loaded = known.read(content.config, content.weights, path=source.path)

    def write(adapter: Adapter) -> AdapterBytes:
        like = Template(content.config, adapter.layout, summary.dtype, summary.template)
        made = known.encode(adapter, card="", metadata={}, like=like, dtype=wanted.dtype, extras=loaded.extras)
        return replace(made, card=content.card, companions=content.companions)

    return _Writer(loaded.adapter, write, _item_bytes(wanted.dtype, summary), _reader(known))


def _fresh(source: SourceAdapter, summary: AdapterSummary, wanted: Wanted) -> _Writer:
    assert wanted.adapter_format is not None
    known = format_named(wanted.adapter_format)
    if known.is_for_images != source.format.is_for_images:
        fact = f"modules are called otherwise in the format {known.name} than in {source.format.name}"
        raise AdapterRefused(fact, kind="layers", path=source.path, hint="without --format it keeps its names")
    if source.format.name == "gguf":
        original, extras = _in_base_names(source, summary, wanted).adapter, {}
    else:
        loaded = source.format.read(source.content.config, source.content.weights, path=source.path)
        original, extras = loaded.adapter, dict(loaded.extras)
    # A header goes into the new file, but for what it says of the ranks and scales of the old one.
    header = json.loads(extras.pop(HEADER).data) if HEADER in extras else {}
    metadata = {name: text for name, text in header.items() if name != METADATA}
    if extras:
        fact = f"{next(iter(extras))} is more than a LoRA factor and has no place in the format {known.name}"
        raise AdapterRefused(fact, kind="extras", path=source.path, hint="keep its format, or merge it first")
    if odd := _not_linear(source.content.weights):
        fact = f"{odd} is of a convolution or of fused experts, which icm does not convert into another format"
        raise AdapterRefused(fact, kind="layers", path=source.path, hint="keep its format")
    own = next((name for name, short in DTYPE_NAMES.items() if short == summary.dtype), "float32")
    dtype = wanted.dtype or own

    def write(adapter: Adapter) -> AdapterBytes:
        made = known.encode(adapter, card="", metadata=metadata, dtype=dtype)
        if len({shape.rank for shape in adapter.layout}) > 1:
            # A fresh adapter may have one rank for all modules; in the form of that, each has its own.
            form, kept = known.inspect(made.config, made.weights), known.read(made.config, made.weights).extras
            like = Template(made.config, adapter.layout, form.dtype, form.template)
            made = known.encode(adapter, card="", metadata={}, like=like, dtype=dtype, extras=kept)
        return replace(made, card=source.content.card)

    return _Writer(original, write, _item_bytes(dtype, summary), _reader(known))


def _not_linear(weights: bytes) -> str | None:
    """Return a tensor of more than two dimensions, if the file is one of safetensors and has one."""
    if weights[8:9] != b"{":
        return None
    tensors = parse_header(header_text(weights), len(weights)).tensors
    return next((tensor.name for tensor in tensors if len(tensor.shape) > 2), None)


def _for_program(source: SourceAdapter, summary: AdapterSummary, wanted: Wanted) -> _Writer:
    runnable = _in_base_names(source, summary, wanted)
    dtype = wanted.dtype or "float32"  # as `icm materialize` writes them
    if wanted.adapter_format == "mlx":
        from icmlora.formats.mlx import CONFIG_NAME, WEIGHTS_NAME
        from icmlora.formats.mlx_writer import encode_mlx

        def write(adapter: Adapter) -> AdapterBytes:
            files = encode_mlx(_with(runnable, adapter), metadata={}, dtype=dtype)
            return AdapterBytes(files[WEIGHTS_NAME], files[CONFIG_NAME])
    else:
        from icmlora.formats.gguf_lora import encode_gguf

        base = _base(summary, wanted)

        def write(adapter: Adapter) -> AdapterBytes:
            return AdapterBytes(encode_gguf(_with(runnable, adapter), base, task=source.name, metadata={}, dtype=dtype))

    return _Writer(runnable.adapter, write, _item_bytes(dtype, summary), None)


def _in_base_names(source: SourceAdapter, summary: AdapterSummary, wanted: Wanted) -> RunnableAdapter:
    """Read an adapter under the names that its base model has in transformers."""
    base = _base(summary, wanted) if source.format.name == "gguf" else None
    with located(source.path):
        return read_converted(source.format, source.content, base, None)


def _base(summary: AdapterSummary, wanted: Wanted) -> GgufBase:
    from icmlora.base_models.lookup import find_base_model, inspect_base

    label, path = summary.base_model or "", wanted.base_model
    try:
        return gguf_base(lambda: find_base_model(label) if path is None else inspect_base(label, path))
    except BaseModelNotFound as error:
        error.hint = "name its folder or GGUF file: --base-model PATH"
        raise


def _with(runnable: RunnableAdapter, adapter: Adapter) -> RunnableAdapter:
    return replace(runnable, adapter=adapter)


def _reader(known: AdapterFormat) -> Callable[[AdapterBytes], Adapter]:
    return lambda files: known.read(files.config, files.weights).adapter


def _item_bytes(dtype: str | None, summary: AdapterSummary) -> int:
    if dtype is not None:
        return ITEM_BYTES[dtype_name(dtype)]
    return max(ITEM_BYTES[part] for part in summary.dtype.split("+"))


def _largest(writer: _Writer, size: int, *, one_rank: bool) -> tuple[Adapter, AdapterBytes]:
    """Cut an adapter as little as a size asks for."""
    if one_rank:
        ranks = max(shape.rank for shape in writer.original.layout)
        per_rank = sum(shape.inputs + shape.outputs for shape in writer.original.layout)
        values: Sequence[int] = [per_rank * rank for rank in range(1, ranks + 1)]

        def cut(count: int) -> Adapter:
            return truncated(writer.original, count + 1)
    else:
        slots = Slots.of(writer.original)
        values, cut = slots.values, slots.first
    low, high, header, tries = -1, len(values), 0, 0  # low fits, high does not
    best: tuple[Adapter, AdapterBytes] | None = None
    smallest = 0
    while high - low > 1:
        count = (low + high) // 2
        if tries < _GUESSES:
            count = sum(writer.item * taken + header <= size for taken in values) - 1
        count = min(max(count, low + 1), high - 1)
        adapter = cut(count)
        content = writer.write(adapter)
        header, tries = len(content.weights) - writer.item * values[count], tries + 1
        if len(content.weights) <= size:
            low, best = count, (adapter, content)
        else:
            high, smallest = count, len(content.weights)
    if best is None:
        fact = f"with one rank a module it takes {smallest:,} bytes, more than {size:,}"
        raise AdapterRefused(
            fact, kind="size", hint="allow more bytes; codes in a store are smaller: `icm encode --size`"
        )
    return best


def _errors(
    writer: _Writer, adapter: Adapter, content: AdapterBytes, dtype: str | None
) -> tuple[float | None, Mapping[str, float] | None]:
    """Measure what was written, if it can be read again; else what was cut, if nothing was rounded."""
    if writer.read is not None:
        written = writer.read(content)
        if {module.name for module in written.modules} == {module.name for module in writer.original.modules}:
            return relative_errors(writer.original, written)
    elif dtype in (None, "float32"):
        return (0.0, None) if adapter is writer.original else relative_errors(writer.original, adapter)
    return None, None
