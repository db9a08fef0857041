"""Convert factor pairs (icmlora/formats/pairs/ab_pairs.py) between files and modules."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch

from icmlora.adapter.model import Adapter, LoraModule
from icmlora.formats.factors import fitted_parts, load_factors, scaled, unscaled
from icmlora.formats.format import AdapterSummary, LoadedAdapter, Template
from icmlora.formats.pairs.ab_pairs import LoraPair, PairForm, SortedPairs
from icmlora.io.safetensors import RawTensor
from icmlora.io.tensors import dtype_name, raw_tensor


def read_pairs(
    weights: bytes, summary: AdapterSummary, sorted_pairs: SortedPairs, scale: Callable[[int], float]
) -> LoadedAdapter:
    """Read the factors in float32, and the extras unchanged.

    Args:
        weights: The whole file.
        summary: Summary of the adapter.
        sorted_pairs: Its factors and extras.
        scale: Rank -> factor between B @ A and dW.

    Raises:
        AdapterRefused: The adapter can have no code, or its scaled values exceed float32.
    """
    pairs = sorted_pairs.pairs
    factors = [tensor for pair in pairs for tensor in (pair.a, pair.b)]
    return load_factors(
        weights, summary, factors, lambda values: (one for pair in pairs for one in _modules(pair, values, scale))
    )


def _modules(pair: LoraPair, values: Mapping[str, torch.Tensor], scale: Callable[[int], float]) -> Iterator[LoraModule]:
    a, b = values[pair.a.name], scaled(pair.module, values[pair.b.name], scale(pair.rank))
    a, b = a.mT if pair.a_is_turned else a, b.mT if pair.b_is_turned else b
    parts = [(a, b)] if a.dim() == 2 else zip(a, b, strict=True)
    for shape, (part_a, part_b) in zip(pair.shapes, parts, strict=True):
        yield LoraModule(shape.module, part_a.contiguous(), part_b.contiguous())


def write_pairs(
    adapter: Adapter,
    like: Template,
    form: PairForm,
    *,
    turned: Callable[[str], tuple[bool, bool]],
    suffix: str,
    scale: Callable[[int], float],
    dtype: str | None,
    rank: int | None = None,
) -> dict[str, RawTensor]:
    """Return the factors of an adapter in the form of another adapter; missing modules become zeros.

    Args:
        adapter: The adapter.
        like: The form of the other adapter.
        form: The format's notes on that form.
        turned: Module -> whether A is stored as (in, r), and whether B is stored as (r, out).
        suffix: Text between a module's name and `.lora_a`.
        scale: Rank -> factor between B @ A and dW in the program that reads the file.
        dtype: Number format of the factors; by default as in the form.
        rank: One rank for all modules, instead of the ranks of the form.

    Raises:
        AdapterRefused: A module has a higher rank than `rank`, the form does not fit, or a value overflows its type.
    """
    tensors: dict[str, RawTensor] = {}
    for module, parts in fitted_parts(adapter, like.layout, form.experts, rank):
        a, b = map(torch.stack, zip(*parts, strict=True)) if module in form.experts else parts[0]
        factors = unscaled((a, b), scale(a.shape[-2]))
        for half, values, is_turned in zip("ab", factors, turned(module), strict=True):
            name = f"{module}{suffix}.lora_{half}"
            kind = form.type_of(name) if dtype is None else dtype_name(dtype)
            tensors[name] = raw_tensor(name, values.mT if is_turned else values, kind)
    return tensors
