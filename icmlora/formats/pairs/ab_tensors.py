"""The tensors of pairs of factors (icmlora/formats/pairs/ab_pairs.py), from a file to modules and back."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

import torch

from icmlora.adapter.layout import ModuleShape, target_modules
from icmlora.adapter.model import Adapter, LoraModule
from icmlora.errors import AdapterRefused
from icmlora.formats.format import AdapterSummary, LoadedAdapter, Template
from icmlora.formats.pairs.ab_pairs import LoraPair, PairForm, SortedPairs, bad_template
from icmlora.formats.peft.tensors import fitted
from icmlora.io.safetensors import RawTensor, TensorHeader, raw_tensors
from icmlora.io.tensors import decode_float32, dtype_name, raw_tensor

_Factors = tuple[torch.Tensor, torch.Tensor]


def read_pairs(
    weights: bytes, summary: AdapterSummary, sorted_pairs: SortedPairs, scale: Callable[[int], float]
) -> LoadedAdapter:
    """Read the factors in float32, and the extras as they are.

    Args:
        weights: The whole file.
        summary: That of the adapter.
        sorted_pairs: Its factors and extras.
        scale: Rank -> what stands between B @ A and dW.

    Raises:
        AdapterRefused: There can be no code of it, or its scale makes its values exceed float32.
    """
    if summary.original_only is not None:
        fact = f"only its original can be used: {summary.original_only}"
        raise AdapterRefused(fact, kind="original-only")
    factors = [tensor for pair in sorted_pairs.pairs for tensor in (pair.a, pair.b)]
    in_file = sorted(factors, key=lambda tensor: tensor.begin)
    values = decode_float32(weights, TensorHeader(tuple(in_file), {}))
    modules = [module for pair in sorted_pairs.pairs for module in _modules(pair, values, scale(pair.rank))]
    targets = target_modules(module.name for module in modules)
    adapter = Adapter(summary.base_model or "", summary.task_type, targets, tuple(modules), summary.revision)
    return LoadedAdapter(adapter, raw_tensors(weights, sorted_pairs.extras))


def _modules(pair: LoraPair, values: Mapping[str, torch.Tensor], scale: float) -> list[LoraModule]:
    a, b = values[pair.a.name], values[pair.b.name] * scale
    if not b.isfinite().all():
        hint = "the training run diverged: take an earlier checkpoint"
        raise AdapterRefused(f"{pair.module}: B times the scale exceeds float32", kind="overflow", hint=hint)
    a, b = a.mT if pair.a_is_turned else a, b.mT if pair.b_is_turned else b
    parts = [(a, b)] if a.dim() == 2 else list(zip(a, b, strict=True))
    return [
        LoraModule(shape.module, part_a.contiguous(), part_b.contiguous())
        for shape, (part_a, part_b) in zip(pair.shapes, parts, strict=True)
    ]


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
    """Write the factors of an adapter in the form of another one; modules that `adapter` lacks become zeros.

    Args:
        adapter: What to write.
        like: The form of the other one.
        form: What its format noted of it.
        turned: Module -> whether A is stored as (in, r), and whether B is as (r, out).
        suffix: What is between the name of a module and `.lora_a`.
        scale: Rank -> what the program that reads it multiplies B @ A by.
        dtype: Number format of the factors; that of the form by default.
        rank: One rank for all modules instead of those of the form.
    """
    modules = {module.name: module for module in adapter.modules}
    whole = {f"{name}.{part}": name for name, count in form.experts.items() for part in range(count)}
    shapes: defaultdict[str, list[ModuleShape]] = defaultdict(list)
    for shape in like.layout:  # the experts of a module are in the order of their numbers
        if rank is not None and rank < shape.rank:
            raise AdapterRefused(f"rank {rank} is too small: a module has rank {shape.rank}", kind="rank")
        shapes[whole.get(shape.module, shape.module)].append(shape if rank is None else shape._replace(rank=rank))
    tensors: dict[str, RawTensor] = {}
    for module, some in shapes.items():
        if len(some) != form.experts.get(module, 1) or len({shape[2:] for shape in some}) > 1:
            raise bad_template()
        largest = max(shape.rank for shape in some)  # one tensor holds all experts
        parts = [fitted(modules.pop(shape.module, None), largest, *shape[2:]) for shape in some]
        factors = _stacked(parts) if module in form.experts else parts[0]
        factor = scale(largest)
        # An adapter of scale 0 does nothing, whatever its factors are.
        unscaled = factors[0], factors[1] / factor if factor else torch.zeros_like(factors[1])
        for half, values, is_turned in zip("ab", unscaled, turned(module), strict=True):
            name = f"{module}{suffix}.lora_{half}"
            kind = form.dtypes.get(name, form.dtype) if dtype is None else dtype_name(dtype)
            tensors[name] = raw_tensor(name, values.mT if is_turned else values, kind)
    if modules:
        raise ValueError(f"the template has no module {next(iter(modules))}")
    return tensors


def _stacked(parts: Sequence[_Factors]) -> _Factors:
    return torch.stack([a for a, _ in parts]), torch.stack([b for _, b in parts])
