"""Convert the factors of an adapter in any format between files and modules.

dW = scale * B @ A      A (r, in), B (out, r), float32; an adapter in memory has the scale folded into B
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch.nn.functional import pad

from icmlora.adapter.layout import ModuleShape
from icmlora.adapter.model import Adapter, LoraModule
from icmlora.errors import AdapterRefused
from icmlora.formats.format import AdapterSummary, LoadedAdapter
from icmlora.formats.noted_form import bad_note
from icmlora.io.safetensors import TensorHeader, TensorInfo, raw_tensors
from icmlora.io.tensors import decode_float32, is_finite

Factors = tuple[torch.Tensor, torch.Tensor]
"""A (r, in) and B (out, r)."""


def load_factors(
    weights: bytes,
    summary: AdapterSummary,
    factors: Iterable[TensorInfo],
    modules: Callable[[Mapping[str, torch.Tensor]], Iterable[LoraModule]],
) -> LoadedAdapter:
    """Read the factors in float32, and the extras unchanged.

    Args:
        weights: The whole file.
        summary: Summary of the adapter.
        factors: Locations of the factors in the file.
        modules: Builds modules from the factors by name, in the shapes of the file.

    Raises:
        AdapterRefused: The adapter can have no code, or its scaled values exceed float32.
    """
    if summary.original_only is not None:
        raise AdapterRefused(f"only its original can be used: {summary.original_only}", kind="original-only")
    in_file = tuple(sorted(factors, key=lambda tensor: tensor.begin))
    made = tuple(modules(decode_float32(weights, TensorHeader(in_file, {}))))
    adapter = Adapter(summary.base_model or "", summary.task_type, summary.target_modules, made, summary.revision)
    return LoadedAdapter(adapter, raw_tensors(weights, summary.extras))


def scaled(module: str, b: torch.Tensor, scale: float) -> torch.Tensor:
    """Return B times the scale. A stays unscaled: it may be the initial A, and the seed search needs its bits.

    Raises:
        AdapterRefused: The result exceeds float32.
    """
    b = b * scale
    if not is_finite(b):
        hint = "the training run diverged: use an earlier checkpoint"
        raise AdapterRefused(f"{module}: B times the scale exceeds float32", kind="overflow", hint=hint)
    return b


def unscaled(factors: Factors, scale: float) -> Factors:
    """Divide B by the scale; B becomes zero for scale 0."""
    a, b = factors
    return a, b / scale if scale else torch.zeros_like(b)


def fitted_parts(
    adapter: Adapter, layout: Sequence[ModuleShape], counts: Mapping[str, int], rank: int | None = None
) -> Iterator[tuple[str, list[Factors]]]:
    """Yield the factors for each pair of tensors: one module, or all experts or groups of a module, with equal ranks.

    Args:
        adapter: The adapter; its factors are padded with zeros, and a missing module becomes zeros.
        layout: The modules to write. Modules of one pair are adjacent, and are named M.0, M.1 ...
        counts: M -> number of modules in its pair, if not one.
        rank: Rank of all modules, instead of their own.

    Raises:
        AdapterRefused: A module has a higher rank than `rank`, or `counts` do not fit the layout.
    """
    modules = {module.name: module for module in adapter.modules}
    whole = {f"{name}.{part}": name for name, count in counts.items() for part in range(count)}
    shapes: defaultdict[str, list[ModuleShape]] = defaultdict(list)
    for shape in layout:
        if rank is not None and rank < shape.rank:
            raise AdapterRefused(f"rank {rank} is too small: a module has rank {shape.rank}", kind="rank")
        shapes[whole.get(shape.module, shape.module)].append(shape)
    if not counts.keys() <= shapes.keys():
        raise bad_note()
    for name, some in shapes.items():
        if len(some) != counts.get(name, 1) or len({shape[2:] for shape in some}) > 1:
            raise bad_note()
        largest = rank or max(shape.rank for shape in some)
        yield name, [fitted(modules.pop(shape.module, None), largest, *shape[2:]) for shape in some]
    if modules:
        raise ValueError(f"the template has no module {next(iter(modules))}")


def fitted(module: LoraModule | None, rank: int, inputs: int, outputs: int) -> Factors:
    """Return factors zero-padded to a rank: (rank, inputs) and (outputs, rank).

    Raises:
        ValueError: The module has a higher rank, or other widths.
    """
    if module is None:
        return torch.zeros(rank, inputs), torch.zeros(outputs, rank)
    missing = rank - module.a.shape[0]
    if missing < 0 or (module.a.shape[1], module.b.shape[0]) != (inputs, outputs):
        raise ValueError(f"{module.name} does not fit the template")
    if not missing:
        return module.a, module.b
    return pad(module.a, (0, 0, 0, missing)), pad(module.b, (0, missing))
