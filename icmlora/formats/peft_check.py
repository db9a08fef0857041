"""Check a PEFT adapter completely, with numpy alone: what `icm ingest` does to every adapter. Never imports torch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from icmlora.adapter.layout import target_modules
from icmlora.errors import AdapterRefused, located
from icmlora.formats.format import AdapterSummary, Buffer
from icmlora.formats.peft_config import AdapterConfig
from icmlora.formats.peft_names import FactorPair, pair_factors
from icmlora.io.finite import check_finite
from icmlora.io.safetensors import TensorHeader, header_text, parse_header


@dataclass(frozen=True)
class CheckedAdapter:
    """A configuration and the factors that fit it, with their summary."""

    config: AdapterConfig
    pairs: tuple[FactorPair, ...]
    summary: AdapterSummary


@dataclass(frozen=True)
class _Plan:
    """Everything that follows from the configuration and the header alone."""

    header: TensorHeader
    checked: CheckedAdapter


# The checkpoints of a run, and most runs of a fleet, have the same configuration and header byte for byte: checking
# those once makes the check of a 1 MB file ten times faster. Large headers are not remembered.
_REMEMBERED_PLANS = 16
_REMEMBERED_BYTES = 256 * 1024


def check_adapter(config: bytes, weights: Buffer, *, path: str | Path | None = None) -> CheckedAdapter:
    """Parse and check an adapter's two files."""
    with located(path):
        text = header_text(weights)
        make_plan = _remembered_plan if len(text) + len(config) <= _REMEMBERED_BYTES else _plan
        plan = make_plan(config, text, len(weights))
        check_finite(weights, plan.header)
    return plan.checked


def _plan(config: bytes, text: bytes, size: int) -> _Plan:
    parsed = AdapterConfig.parse(config)
    header = parse_header(text, size)
    pairs = pair_factors(header)
    for pair in pairs:
        # PEFT would build layers of the stated rank and then fail to load the tensors.
        rank, stated = pair.a.shape[0], parsed.rank_of(pair.module)
        if rank != stated:
            message = f"{pair.a.name} has rank {rank} but adapter_config.json says {stated}"
            raise AdapterRefused(message, kind="rank")
    return _Plan(header, CheckedAdapter(parsed, pairs, _summarise(parsed, pairs)))


_remembered_plan = lru_cache(maxsize=_REMEMBERED_PLANS)(_plan)


def _summarise(config: AdapterConfig, pairs: tuple[FactorPair, ...]) -> AdapterSummary:
    layout = tuple(pair.shape for pair in pairs)
    dtypes = {tensor.dtype for pair in pairs for tensor in (pair.a, pair.b)}
    return AdapterSummary(
        base_model=config.base_model,
        revision=config.revision,
        task_type=config.task_type,
        dtype="+".join(sorted(dtypes)),
        rank_max=max(shape.rank for shape in layout),
        parameters=sum(shape.parameters for shape in layout),
        target_modules=target_modules(shape.module for shape in layout),
        layout=layout,
    )
