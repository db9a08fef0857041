"""Check an adapter in memory and say what it is, with numpy alone: what `icm ingest` does to every file.

Read and write PEFT LoRA folders: adapter_config.json + adapter_model.safetensors + README.md.

What is written is the one form that every engine reads alike: one rank for all modules (padded with zeros), the scale
folded into B, alpha equal to the rank, no patterns, literal target modules.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch.nn.functional import pad

from icmlora.adapter.layout import PEFT_PREFIX, FactorPair, ModuleShape, pair_factors, target_modules
from icmlora.adapter.model import Adapter, LoraModule
from icmlora.errors import AdapterRefused, located
from icmlora.formats.peft_config import MAX_CONFIG_BYTES, AdapterConfig
from icmlora.formats.tree import CONFIG_NAME, WEIGHTS_NAME
from icmlora.io.files import read_regular
from icmlora.io.safetensors import TensorHeader, check_finite, header_text, parse_header, read_header, read_tensor_file
from icmlora.io.staging import write_original
from icmlora.io.tensors import decode_float32, encode_torch


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


__all__ = ["CONFIG_NAME", "WEIGHTS_NAME", "load_adapter", "load_adapter_folder", "save_adapter"]

# vLLM and SGLang reserve space for ranks of 8, 16, 32, 64, ...
_SMALLEST_RANK = 8


def load_adapter(config: bytes, weights: bytes, *, path: str | Path | None = None) -> Adapter:
    """Read an adapter from the bytes of its two files.

    Args:
        config: `adapter_config.json`.
        weights: `adapter_model.safetensors`.
        path: Where they came from, for messages.

    Returns:
        The adapter in float32, the scale folded into B; not yet canonical.

    Raises:
        UnsafeInput: A pickle, hostile names, or limits broken.
        AdapterRefused: Damaged, or not representable exactly; `kind` says why.
    """
    checked = check_adapter(config, weights, path=path)
    with located(path):
        tensors = decode_float32(weights, read_header(weights))
        modules = []
        for pair in checked.pairs:
            b = tensors[pair.b.name] * checked.config.scale_of(pair.module)
            modules.append(LoraModule(pair.module, tensors[pair.a.name], b))
        _check_scaled(modules)
    summary = checked.summary
    return Adapter(summary.base_model, summary.task_type, summary.target_modules, tuple(modules), summary.revision)


def load_adapter_folder(folder: Path) -> Adapter:
    """Read an adapter from a PEFT folder; raises as `load_adapter` does."""
    config = read_regular(folder / CONFIG_NAME, max_bytes=MAX_CONFIG_BYTES)
    return load_adapter(config, read_tensor_file(folder / WEIGHTS_NAME), path=folder)


def save_adapter(
    adapter: Adapter,
    directory: Path,
    *,
    dtype: str = "bfloat16",
    card: str,
    metadata: Mapping[str, str],
    force: bool = False,
) -> None:
    """Write an adapter as a PEFT folder, atomically and durably; the same arguments give the same bytes.

    Values are rounded to nearest even. bfloat16 keeps float32's range and 8 significant bits (relative error up to
    2^-9 per value); float16 keeps 11 bits but ends at 65504, which is refused rather than rounded to infinity.

    Args:
        adapter: What to write.
        directory: The folder, absent or empty unless `force`.
        dtype: "bfloat16", "float16" or "float32".
        card: Text of README.md.
        metadata: Text for the tensor file's header, beside `{"format": "pt"}`.
        force: Replace the adapter in a folder that holds something: weights first, configuration last.

    Raises:
        OutputExists: The folder is not empty and `force` is not given.
        AdapterRefused: A value that `dtype` cannot hold.
    """
    rank = _written_rank(adapter)
    tensors: dict[str, torch.Tensor] = {}
    for module in adapter.modules:
        missing = rank - module.a.shape[0]
        tensors[f"{PEFT_PREFIX}{module.name}.lora_A.weight"] = pad(module.a, (0, 0, 0, missing))
        tensors[f"{PEFT_PREFIX}{module.name}.lora_B.weight"] = pad(module.b, (0, missing))
    with located(directory):
        weights = encode_torch(tensors, {"format": "pt", **metadata}, dtype=dtype)
    write_original(_config(adapter, rank), weights, card, directory, force=force)


def _check_scaled(modules: list[LoraModule]) -> None:
    for module in modules:
        if not torch.isfinite(module.b).all():
            message = f"{module.name}: B times the scale exceeds float32"
            raise AdapterRefused(message, kind="overflow", hint="the training run diverged: take an earlier checkpoint")


def _written_rank(adapter: Adapter) -> int:
    largest = max(module.a.shape[0] for module in adapter.modules)
    return max(_SMALLEST_RANK, 1 << (largest - 1).bit_length())


def _config(adapter: Adapter, rank: int) -> bytes:
    fields = {
        "alpha_pattern": {},
        "base_model_name_or_path": adapter.base_model,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": {},
        "revision": adapter.revision,
        "target_modules": list(adapter.target_modules),
        "task_type": adapter.task_type,
        "use_dora": False,
        "use_rslora": False,
    }
    return (json.dumps(fields, indent=2, sort_keys=True) + "\n").encode()
