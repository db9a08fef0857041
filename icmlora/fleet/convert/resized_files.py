"""Make the files of one adapter in another format, with other ranks, or in another number format.

    another format     converted first, in float32                                      ../write/format_pairs.py
    LoHa, LoKr ...     first made LoRA of a rank, by singular values                    formats/images/lycoris_lora.py
    ranks, numbers     then written in its own form: names, header, heads and all else stay       Template

A size is met by cutting the slots that matter least (icmlora/adapter/resize.py). How many bytes a header takes is known
when it is written, so that takes a few tries.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from icmlora.adapter.arithmetic import truncated
from icmlora.adapter.metrics import errors_by_group, relative, squared_error
from icmlora.adapter.model import Adapter
from icmlora.adapter.module_groups import grouping
from icmlora.adapter.resize import RankedSlots
from icmlora.errors import AdapterRefused, located
from icmlora.fleet.write.format_pairs import SourceAdapter, check_pair, convert_content, written_from
from icmlora.formats.catalogue import check_image_names, format_of_lora, lycoris_to_lora
from icmlora.formats.file_header import HEADER, with_ranks
from icmlora.formats.format import AdapterBytes, AdapterFormat, AdapterSummary, Template
from icmlora.io.safetensors import ITEM_BYTES, RawTensor, header_text, parse_header
from icmlora.io.tensors import DTYPE_NAMES, dtype_name

_PROGRAMS = ("gguf", "mlx")
"""Formats whose programs use float32 by default."""
_ONE_RANK = ("mlx",)
"""Formats that state one rank for all modules."""
_GUESSES = 6
"""Tries in which the bytes of a header are taken from the try before; then the range is halved."""


@dataclass(frozen=True)
class Wanted:
    """What is to become of an adapter; None for what stays as it is."""

    adapter_format: AdapterFormat | None = None  # the format
    rank: int | None = None  # largest rank of a module
    size: int | None = None  # most bytes of the file of weights
    dtype: str | None = None  # "bfloat16", "float16" or "float32"


@dataclass(frozen=True, eq=False)
class ConvertedFiles:
    """An adapter as the files of a format."""

    content: AdapterBytes  # its files
    format: AdapterFormat  # their format
    rank: int  # the largest rank of a module
    relative_error: float = 0.0  # ||dW' - dW|| / ||dW|| of what was written
    # The same of each group of modules, such as `q_proj`; None if nothing changed.
    groups: Mapping[str, float] | None = None


def convert_files(source: SourceAdapter, wanted: Wanted) -> ConvertedFiles:
    """Make the files of an adapter; what needs no change keeps its bytes.

    Raises:
        AdapterRefused: It is damaged, more than the format has a place for, or cannot be made so small.
        BaseModelNotFound: The configuration of its base model is needed, and is not on this machine.
    """
    _check_names(source, wanted.adapter_format)
    summary = source.summary
    dtype, made_lora = wanted.dtype, None
    is_other = source.format.name == "lycoris" and summary.original_only is not None and not summary.does_nothing
    known = format_of_lora(source.content.weights) if is_other else source.format
    target = wanted.adapter_format or (source.format if wanted.rank is None else known)
    if target.name != source.format.name:
        check_pair(known, target)
    if is_other and (wanted.rank is not None or target.name != source.format.name):
        source, made_lora = _as_lora(source, summary, wanted)
        dtype = dtype or _own_dtype(summary)
    if source.format.name != target.name:
        dtype = dtype or ("float32" if target.name in _PROGRAMS else _own_dtype(summary))
        # In float32: ranks are cut and numbers are rounded once, below.
        content = convert_content(source, target, metadata={}, dtype="float32")
        source = replace(source, format=target, content=content, initial=None)
    written = _in_own_form(source, replace(wanted, dtype=dtype))
    return written if made_lora is None else _with_earlier(written, made_lora)


def _check_names(source: SourceAdapter, target: AdapterFormat | None) -> None:
    """Refuse an image adapter whose names cannot be converted, before its values are looked at."""
    if target is None or target.name == source.format.name or not target.is_for_images:
        return
    if source.format.name in written_from(target):
        with located(source.path):
            check_image_names(source.content.weights, source.format, target)


def _own_dtype(summary: AdapterSummary) -> str:
    return next((name for name, short in DTYPE_NAMES.items() if short == summary.dtype), "float32")


def _as_lora(
    source: SourceAdapter, summary: AdapterSummary, wanted: Wanted
) -> tuple[SourceAdapter, Mapping[str, tuple[float, float]]]:
    """Make LoRA of another method; also return squared errors and norms by module."""
    if wanted.rank is None:
        fact = f"its modules have no rank: {summary.original_only}"
        raise AdapterRefused(fact, kind="original-only", path=source.path, hint="specify a rank, such as --rank 16")
    with located(source.path):
        made = lycoris_to_lora(source.content.weights, wanted.rank)
    content = replace(source.content, weights=made.weights)
    return replace(source, content=content, format=format_of_lora(source.content.weights)), made.errors


def _with_earlier(written: ConvertedFiles, errors: Mapping[str, tuple[float, float]]) -> ConvertedFiles:
    """Add the errors that an adapter had before it was written."""
    group_of, groups = grouping(is_for_images=True), dict[str, list[tuple[float, float]]]()
    for module, parts in errors.items():
        groups.setdefault(group_of(module), []).append(parts)

    def both(parts: Sequence[tuple[float, float]], later: float) -> float:
        # What singular values leave over and what rounding adds have nothing to do with each other.
        earlier = relative(parts)
        return math.sqrt(earlier + later**2 * max(1.0 - earlier, 0.0))

    found = {group: both(parts, (written.groups or {}).get(group, 0.0)) for group, parts in sorted(groups.items())}
    return replace(written, relative_error=both([*errors.values()], written.relative_error), groups=found)


class _Form:
    """The form in which an adapter is written: its own, with other ranks or numbers."""

    def __init__(self, source: SourceAdapter, summary: AdapterSummary, dtype: str | None) -> None:
        self.format, self.content, self.summary, self.dtype = source.format, source.content, summary, dtype
        loaded = source.format.read(source.content.config, source.content.weights, path=source.path)
        self.original, self.extras = loaded.adapter, loaded.extras

    @property
    def item(self) -> int:
        """Bytes of a value."""
        if self.dtype is not None:
            return ITEM_BYTES[dtype_name(self.dtype)]
        return max(ITEM_BYTES[part] for part in self.summary.dtype.split("+"))

    def write(self, adapter: Adapter) -> AdapterBytes:
        """Write the adapter with the ranks of another one."""
        extras, content = dict(self.extras), self.content
        if HEADER in extras and adapter.layout != self.original.layout:
            extras[HEADER] = _restated(extras[HEADER], content, adapter)
        like = Template(content.config, adapter.layout, self.summary.dtype, self.summary.template)
        made = self.format.encode(adapter, card="", metadata={}, like=like, dtype=self.dtype, extras=extras)
        return replace(made, card=content.card, companions=content.companions)

    def read(self, content: AdapterBytes) -> Adapter:
        """Read what was written."""
        return self.format.read(content.config, content.weights).adapter


def _restated(header: RawTensor, content: AdapterBytes, adapter: Adapter) -> RawTensor:
    """Return the metadata of a header with the ranks that an adapter has."""
    names = (tensor.name for tensor in parse_header(header_text(content.weights), len(content.weights)).tensors)
    has_alphas = any(name.endswith(".alpha") for name in names)
    ranks = (shape.rank for shape in adapter.layout)
    data = json.dumps(with_ranks(json.loads(header.data), ranks, alphas_stay=has_alphas)).encode()
    return RawTensor(header.dtype, (len(data),), data)


def _in_own_form(source: SourceAdapter, wanted: Wanted) -> ConvertedFiles:
    """Cut ranks and round numbers as they are wanted."""
    summary = source.summary
    fits = wanted.size is None or len(source.content.weights) <= wanted.size
    is_typed = wanted.dtype is None or DTYPE_NAMES.get(wanted.dtype) == summary.dtype
    if is_typed and fits and (wanted.rank is None or summary.rank_max <= wanted.rank):
        return ConvertedFiles(source.content, source.format, summary.rank_max)
    form = _Form(source, summary, wanted.dtype)
    adapter = form.original
    if wanted.rank is not None and summary.rank_max > wanted.rank:
        adapter = truncated(adapter, wanted.rank)
    content = form.write(adapter)
    if wanted.size is not None and len(content.weights) > wanted.size:
        adapter, content = _largest(form, wanted.size)
    written = form.read(content)
    group_of = grouping(is_for_images=source.format.is_for_images)
    groups = errors_by_group(form.original, {"": written}, group_of)
    errors = {group.group: group.errors[""] for group in sorted(groups, key=lambda group: group.group)}
    error = math.sqrt(squared_error(form.original, written))
    return ConvertedFiles(content, source.format, max(shape.rank for shape in adapter.layout), error, errors)


def _largest(form: _Form, size: int) -> tuple[Adapter, AdapterBytes]:
    """Cut an adapter as little as a size asks for."""
    if form.format.name in _ONE_RANK:
        ranks = max(shape.rank for shape in form.original.layout)
        per_rank = sum(shape.inputs + shape.outputs for shape in form.original.layout)
        values: Sequence[int] = [per_rank * rank for rank in range(1, ranks + 1)]

        def cut(count: int) -> Adapter:
            return truncated(form.original, count + 1)
    else:
        slots = RankedSlots.of(form.original)
        values, cut = slots.values, slots.first
    low, high, header, tries = -1, len(values), 0, 0  # low fits, high does not
    best: tuple[Adapter, AdapterBytes] | None = None
    smallest = 0
    while high - low > 1:
        count = (low + high) // 2
        if tries < _GUESSES:
            count = sum(form.item * taken + header <= size for taken in values) - 1
        count = min(max(count, low + 1), high - 1)
        adapter = cut(count)
        content = form.write(adapter)
        header, tries = len(content.weights) - form.item * values[count], tries + 1
        if len(content.weights) <= size:
            low, best = count, (adapter, content)
        else:
            high, smallest = count, len(content.weights)
    if best is None:
        fact = f"at rank 1 it takes {smallest:,} bytes, more than {size:,}"
        raise AdapterRefused(
            fact,
            kind="size",
            hint="allow more bytes, or store the adapter and run `icm encode --size`, which makes smaller codes",
        )
    return best
