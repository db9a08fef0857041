"""The factors of an adapter in any format, from a file to modules and back.

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
    """Read the factors in float32, and the extras as they are.

    Args:
        weights: The whole file.
        summary: That of the adapter.
        factors: Where its factors are in the file.
        modules: Makes its modules of the factors by name, in the shapes that the file has.

    Raises:
        AdapterRefused: There can be no code of it, or its scale makes its values exceed float32.
    """
    if summary.original_only is not None:
        raise AdapterRefused(f"only its original can be used: {summary.original_only}", kind="original-only")
    in_file = tuple(sorted(factors, key=lambda tensor: tensor.begin))
    made = tuple(modules(decode_float32(weights, TensorHeader(in_file, {}))))
    adapter = Adapter(summary.base_model or "", summary.task_type, summary.target_modules, made, summary.revision)
    return LoadedAdapter(adapter, raw_tensors(weights, summary.extras))


def scaled(module: str, b: torch.Tensor, scale: float) -> torch.Tensor:
    """Return B with the scale folded in: A may be the initial one, whose bits the seed search needs.

    Raises:
        AdapterRefused: It exceeds float32.
    """
    b = b * scale
    if not is_finite(b):
        hint = "the training run diverged: use an earlier checkpoint"
        raise AdapterRefused(f"{module}: B times the scale exceeds float32", kind="overflow", hint=hint)
    return b


def unscaled(factors: Factors, scale: float) -> Factors:
    """Take the scale out of B again. An adapter of scale 0 does nothing, whatever its factors are."""
    a, b = factors
    return a, b / scale if scale else torch.zeros_like(b)


def fitted_parts(
    adapter: Adapter, layout: Sequence[ModuleShape], counts: Mapping[str, int], rank: int | None = None
) -> Iterator[tuple[str, list[Factors]]]:
    """Yield what one pair of tensors holds: a module, or the experts or groups of one, all of one rank.

    Args:
        adapter: Its factors are filled up with zeros; a module that it lacks becomes zeros.
        layout: The modules to write. Those of one pair follow each other, and are called M.0, M.1 ...
        counts: M -> how many modules are in its pair, where that is not one.
        rank: That of all modules instead of their own.

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
    """Return factors of the wanted rank, filled up with zeros: (rank, inputs) and (outputs, rank).

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
