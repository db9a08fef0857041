"""Make the files of one adapter in another format, with other ranks, or in another number format.

    LoHa, LoKr ...     converted to LoRA of a rank, by singular values                  formats/images/lycoris_lora.py
    another format     converted in float32                                             ../write/format_pairs.py
    ranks, numbers     written in its own form: names, header, heads and all else stay  Template

To reach a size, the least important slots are cut (icmlora/adapter/resize.py). The size of the header is known only
after writing, so this takes a few tries.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
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
from icmlora.formats.format import AdapterBytes, AdapterFormat, Template
from icmlora.io.safetensors import ITEM_BYTES, RawTensor, header_text, parse_header
from icmlora.io.tensors import DTYPE_NAMES, dtype_name

_PROGRAMS = ("gguf", "mlx")
"""Formats whose programs use float32 by default."""
_ONE_RANK = ("mlx",)
"""Formats that state one rank for all modules."""
_GUESSES = 6
"""Tries that take the size of the header from the previous try; then the range is halved."""


@dataclass(frozen=True)
class Wanted:
    """The requested changes; None keeps the value of the source."""

    adapter_format: AdapterFormat | None = None
    rank: int | None = None  # largest rank of a module
    size: int | None = None  # maximum bytes of the weights
    dtype: str | None = None  # "bfloat16", "float16" or "float32"


@dataclass(frozen=True, eq=False)
class ConvertedFiles:
    """An adapter as the files of a format."""

    content: AdapterBytes
    format: AdapterFormat
    rank: int  # the largest rank of a module
    relative_error: float = 0.0  # ||dW' - dW|| / ||dW|| of the written files
    # The same of each group of modules, such as `q_proj`; None if nothing changed.
    groups: dict[str, float] | None = None


def convert_files(source: SourceAdapter, wanted: Wanted) -> ConvertedFiles:
    """Make the files of an adapter; if nothing changes, its bytes stay the same.

    Raises:
        AdapterRefused: It is damaged, has parts that the format cannot represent, or cannot be made so small.
        BaseModelNotFound: The configuration of its base model is needed, and is not on this machine.
    """
    own, weights = source.format, source.content.weights
    target = wanted.adapter_format
    if target is not None and target.name != own.name and target.is_for_images and own.name in written_from(target):
        with located(source.path):  # refuse names before reading values
            check_image_names(weights, own, target)
    summary, dtype = source.summary, wanted.dtype
    own_dtype = next((name for name, short in DTYPE_NAMES.items() if short == summary.dtype), "float32")
    errors: Mapping[str, tuple[float, float]] | None = None  # squared errors and norms by module
    known = own
    is_other = own.name == "lycoris" and summary.original_only is not None and not summary.does_nothing
    if is_other:
        known = format_of_lora(weights)
    target = target or (own if wanted.rank is None else known)
    if target.name != own.name:
        check_pair(known, target)
    if is_other and (wanted.rank is not None or target.name != own.name):
        if wanted.rank is None:
            fact = f"its modules have no rank: {summary.original_only}"
            raise AdapterRefused(fact, kind="original-only", path=source.path, hint="specify a rank, such as --rank 16")
        with located(source.path):
            lora = lycoris_to_lora(weights, wanted.rank)
        source = replace(source, content=replace(source.content, weights=lora.weights), format=known)
        errors, dtype = lora.errors, dtype or own_dtype
    if source.format.name != target.name:
        dtype = dtype or ("float32" if target.name in _PROGRAMS else own_dtype)
        # In float32: ranks are cut and numbers are rounded once, below.
        content = convert_content(source, target, metadata={}, dtype="float32")
        source = replace(source, format=target, content=content, initial=None)
    written = _in_own_form(source, replace(wanted, dtype=dtype))
    return written if errors is None else _with_earlier(written, errors)


def _with_earlier(written: ConvertedFiles, errors: Mapping[str, tuple[float, float]]) -> ConvertedFiles:
    """Add the errors of the conversion to LoRA: the squared error and the squared norm of each module."""
    group_of, groups = grouping(is_for_images=True), defaultdict[str, list[tuple[float, float]]](list)
    for module, parts in errors.items():
        groups[group_of(module)].append(parts)

    def both(parts: Sequence[tuple[float, float]], later: float) -> float:
        # The error of the singular values and the rounding error are independent.
        earlier = relative(parts)
        return math.sqrt(earlier + later**2 * max(1.0 - earlier, 0.0))

    found = {group: both(parts, (written.groups or {}).get(group, 0.0)) for group, parts in sorted(groups.items())}
    return replace(written, relative_error=both([*errors.values()], written.relative_error), groups=found)


def _in_own_form(source: SourceAdapter, wanted: Wanted) -> ConvertedFiles:
    """Cut ranks and round numbers; all else, such as names, header and heads, stays."""
    summary, content, known = source.summary, source.content, source.format
    fits = wanted.size is None or len(content.weights) <= wanted.size
    is_typed = wanted.dtype is None or DTYPE_NAMES.get(wanted.dtype) == summary.dtype
    if is_typed and fits and (wanted.rank is None or summary.rank_max <= wanted.rank):
        return ConvertedFiles(content, known, summary.rank_max)
    loaded = known.read(content.config, content.weights, path=source.path)
    original = loaded.adapter

    def write(adapter: Adapter) -> AdapterBytes:
        extras = dict(loaded.extras)
        if HEADER in extras and adapter.layout != original.layout:
            names = [tensor.name for tensor in parse_header(header_text(content.weights), len(content.weights)).tensors]
            has_alphas = any(name.endswith(".alpha") for name in names)
            ranks = (shape.rank for shape in adapter.layout)
            fields = with_ranks(json.loads(extras[HEADER].data), ranks, alphas_stay=has_alphas)
            data = json.dumps(fields).encode()
            extras[HEADER] = RawTensor(extras[HEADER].dtype, (len(data),), data)
        like = Template(content.config, adapter.layout, summary.dtype, summary.template)
        made = known.encode(adapter, card="", metadata={}, like=like, dtype=wanted.dtype, extras=extras)
        return replace(made, card=content.card, companions=content.companions)

    adapter = original
    if wanted.rank is not None and summary.rank_max > wanted.rank:
        adapter = truncated(adapter, wanted.rank)
    made = write(adapter)
    if wanted.size is not None and len(made.weights) > wanted.size:
        dtypes = summary.dtype.split("+") if wanted.dtype is None else [dtype_name(wanted.dtype)]
        item = max(ITEM_BYTES[name] for name in dtypes)  # bytes of a value
        adapter, made = _largest(original, wanted.size, item, write, has_one_rank=known.name in _ONE_RANK)
    written = known.read(made.config, made.weights).adapter
    groups = errors_by_group(original, {"": written}, grouping(is_for_images=known.is_for_images))
    errors = {group.group: group.errors[""] for group in sorted(groups, key=lambda group: group.group)}
    error = math.sqrt(squared_error(original, written))
    return ConvertedFiles(made, known, max(shape.rank for shape in adapter.layout), error, errors)


def _largest(
    original: Adapter, size: int, item: int, write: Callable[[Adapter], AdapterBytes], *, has_one_rank: bool
) -> tuple[Adapter, AdapterBytes]:
    """Cut an adapter as little as possible so that its weights have at most `size` bytes, `item` bytes per value."""
    if has_one_rank:
        per_rank = sum(shape.inputs + shape.outputs for shape in original.layout)
        ranks = max(shape.rank for shape in original.layout)
        values: Sequence[int] = [per_rank * rank for rank in range(1, ranks + 1)]

        def cut(count: int) -> Adapter:
            return truncated(original, count + 1)
    else:
        slots = RankedSlots.of(original)
        values, cut = slots.values, slots.first
    low, high, header, tries = -1, len(values), 0, 0  # low fits, high does not
    best: tuple[Adapter, AdapterBytes] | None = None
    smallest = 0
    while high - low > 1:
        count = (low + high) // 2
        if tries < _GUESSES:
            count = sum(item * taken + header <= size for taken in values) - 1
        count = min(max(count, low + 1), high - 1)
        adapter = cut(count)
        content = write(adapter)
        header, tries = len(content.weights) - item * values[count], tries + 1
        if len(content.weights) <= size:
            low, best = count, (adapter, content)
        else:
            high, smallest = count, len(content.weights)
    if best is None:
        fact = f"at rank 1 it takes {smallest:,} bytes, more than {size:,}"
        hint = "allow more bytes, or store the adapter and run `icm encode --size`, which makes smaller codes"
        raise AdapterRefused(fact, kind="size", hint=hint)
    return best
