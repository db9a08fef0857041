"""Check a PEFT adapter completely during `icm ingest`, with numpy only. Never imports torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from icmlora.adapter.layout import target_modules
from icmlora.errors import AdapterRefused, UnsafeInput
from icmlora.formats.format import AdapterSummary, Buffer
from icmlora.formats.noted_form import note, types_to_note
from icmlora.formats.peft.config import AdapterConfig, read_facts, stated_rank, stated_targets
from icmlora.formats.peft.experts import resolve_parameters
from icmlora.formats.peft.names import FactorPair, SortedTensors, sort_tensors, wrapper_in
from icmlora.io.finite import check_finite, is_zero
from icmlora.io.safetensors import FLOAT_TYPES, TensorHeader, header_text, parse_header, remembered

_PLAIN_METADATA = {"format": "pt"}
NOTHING = "does nothing"  # prefix of `original_only` for an adapter that does not change its base model


@dataclass(frozen=True)
class CheckedAdapter:
    """A checked adapter; `config` and `tensors` are None if it can have no code."""

    header: TensorHeader
    summary: AdapterSummary
    config: AdapterConfig | None = None
    tensors: SortedTensors | None = None


def check_adapter(config: bytes, weights: Buffer) -> CheckedAdapter:
    """Parse and check an adapter's two files; safely readable input is never refused.

    Raises:
        AdapterRefused: A file is damaged.
        UnsafeInput: Hostile names, or exceeded limits.
    """
    plan = _plan(config, header_text(weights), len(weights))
    try:
        check_finite(weights, plan.header)
    except AdapterRefused as refusal:
        return _without_code(plan, refusal.message, does_nothing=True)
    parsed, tensors = plan.config, plan.tensors
    if parsed is None or tensors is None:
        return plan
    # Stops at the first module with a nonzero dW.
    if all(
        parsed.scale_of(pair.target or pair.module) == 0.0 or is_zero(weights, pair.b) or is_zero(weights, pair.a)
        for pair in tensors.pairs
    ):
        has_extras = bool(tensors.extras)
        what = "its LoRA does nothing" if has_extras else NOTHING
        return _without_code(plan, f"{what}: B @ A is zero in every module", does_nothing=not has_extras)
    return plan


@remembered  # makes the check of a 1 MB file ten times faster
def _plan(config: bytes, text: bytes, size: int) -> CheckedAdapter:
    """Check the configuration and the header, without the values."""
    facts = read_facts(config)
    header = parse_header(text, size)
    try:
        if not header.tensors:
            raise AdapterRefused(f"{NOTHING}: it holds no tensors", kind="empty")
        parsed = AdapterConfig.parse(config)
        tensors = resolve_parameters(parsed, stated_targets(config), sort_tensors(header))
        _check_pairs(parsed, tensors)
    except UnsafeInput:
        raise
    except AdapterRefused as refusal:
        summary = AdapterSummary(
            **vars(facts),
            dtype=_joined(tensor.dtype for tensor in header.tensors),
            rank_max=stated_rank(config),
            parameters=sum(prod(tensor.shape) for tensor in header.tensors),
            target_modules=stated_targets(config),
            layout=(),
            original_only=refusal.message,
            does_nothing=not header.tensors,
        )
        return CheckedAdapter(header, summary)
    layout = tuple(shape for pair in tensors.pairs for shape in pair.shapes)
    summary = AdapterSummary(
        **vars(facts),
        dtype=_joined(tensor.dtype for pair in tensors.pairs for tensor in (pair.a, pair.b)),
        rank_max=max(shape.rank for shape in layout),
        parameters=sum(shape.parameters for shape in layout),
        target_modules=target_modules(pair.module for pair in tensors.pairs),
        layout=layout,
        extras=tensors.extras,
        template=_template(tensors.pairs, header.metadata),
        wrapper=next(filter(None, map(wrapper_in, (tensor.name for tensor in header.tensors))), None),
    )
    return CheckedAdapter(header, summary, parsed, tensors)


def _check_pairs(config: AdapterConfig, tensors: SortedTensors) -> None:
    if not tensors.pairs:
        raise AdapterRefused("has no LoRA factors", kind="empty")
    for pair in tensors.pairs:
        # PEFT would build layers of the stated rank and then fail to load the tensors.
        rank, stated = pair.a.shape[0], config.rank_of(pair.target or pair.module)
        if rank != stated * pair.experts:
            message = f"{pair.a.name} has rank {rank}, but adapter_config.json states {stated}"
            raise AdapterRefused(message, kind="rank")
        if unknown := {pair.a.dtype, pair.b.dtype} - FLOAT_TYPES:
            raise AdapterRefused(f"{pair.a.name} has the unsupported type {min(unknown)}", kind="dtype")


def _without_code(plan: CheckedAdapter, reason: str, *, does_nothing: bool) -> CheckedAdapter:
    summary = replace(plan.summary, layout=(), extras=(), template="")
    reason = plan.summary.original_only or reason
    return CheckedAdapter(plan.header, replace(summary, original_only=reason, does_nothing=does_nothing))


def _template(pairs: tuple[FactorPair, ...], metadata: Mapping[str, str]) -> str:
    """Return a note of differences from two linear factors of one type under PEFT's usual names."""
    tensors = [tensor for pair in pairs for tensor in (pair.a, pair.b)]
    details = {
        "experts": {pair.module: pair.experts for pair in pairs if pair.experts > 1},
        "groups": {pair.module: pair.groups for pair in pairs if pair.groups > 1},
        "targets": {pair.module: pair.target for pair in pairs if pair.target not in ("", pair.module)},
        "names": {pair.module: [pair.a.name, pair.b.name] for pair in pairs if not pair.has_usual_names},
        "shapes": {tensor.name: list(tensor.shape) for tensor in tensors if len(tensor.shape) != 2},
        **types_to_note(tensors),
    }
    # Empty metadata differs from the usual metadata, so note it.
    own = {} if metadata == _PLAIN_METADATA else {"metadata": dict(metadata)}
    return note(details, own)


def _joined(dtypes: Any) -> str:
    return "+".join(sorted(set(dtypes))) or "none"
