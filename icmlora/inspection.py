"""Check an adapter in memory and say what it is, with numpy alone: what `icm ingest` does to every file."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from icmlora.adapter_config import AdapterConfig
from icmlora.errors import AdapterRefused, located
from icmlora.layout import FactorPair, ModuleShape, pair_factors, target_modules
from icmlora.tensorfile import TensorHeader, header_text, parse_header
from icmlora.values import check_finite


@dataclass(frozen=True)
class AdapterSummary:
    """What an adapter is, without its values."""

    base_model: str
    """The base model's label as the configuration gives it: opaque text."""
    revision: str | None
    task_type: str | None
    dtype: str
    """"F32", "F16" or "BF16"; several joined with "+" where the file mixes them."""
    rank_max: int
    parameters: int
    target_modules: tuple[str, ...]
    """Derived from the tensors, never from the configuration."""
    layout: tuple[ModuleShape, ...]
    """Modules in natural order, named as in the base model (without PEFT's prefix)."""


@dataclass(frozen=True)
class CheckedAdapter:
    """A configuration and the factors that fit it, with their summary; the values have been found finite."""

    config: AdapterConfig
    pairs: tuple[FactorPair, ...]
    summary: AdapterSummary


@dataclass(frozen=True)
class _Plan:
    """Everything that follows from the configuration and the header alone."""

    header: TensorHeader
    checked: CheckedAdapter


# The checkpoints of a run, and most runs of a fleet, have the same configuration and header byte for byte: checking
# those once makes the check of a 1 MB file ten times faster. Large headers are not kept.
_REMEMBERED_PLANS = 16
_REMEMBERED_BYTES = 256 * 1024


def inspect_adapter(
    config: bytes, weights: bytes | bytearray | memoryview, *, path: str | Path | None = None
) -> AdapterSummary:
    """Check an adapter's two files and summarise them.

    Args:
        config: The bytes of `adapter_config.json`.
        weights: The bytes of `adapter_model.safetensors`, any bytes-like object.
        path: Where they came from, for messages.

    Raises:
        UnsafeInput: A pickle, hostile names, or limits broken.
        AdapterRefused: The adapter is damaged or could not be given back exactly; `kind` says why.
    """
    return check_adapter(config, weights, path=path).summary


def check_adapter(
    config: bytes, weights: bytes | bytearray | memoryview, *, path: str | Path | None = None
) -> CheckedAdapter:
    """Parse and check an adapter's two files; raises as `inspect_adapter` does."""
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
