"""Distortion: the distance between the dW of two adapters, computed from r x r traces in float64.

    ||B A||^2 = tr((B^T B) (A A^T)),   <B A, D C> = tr((B^T D) (C A^T)),   ||B A - D C||^2 = their combination

dW itself (out x in per module) is never formed. Everything runs on one thread, because multi-threaded sums may differ
in the last bit: the error is measured when a code is made and again when it is read, and compared with a limit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from icmlora.adapter.layout import ModuleShape
from icmlora.adapter.model import Adapter, LoraModule
from icmlora.io.threads import one_thread

_DECIMALS = 6  # of a distance: float64 rounding of its square affects the seventh


def squared_error(original: Adapter, other: Adapter) -> float:
    """Return ||dW_other - dW_original||^2 / ||dW_original||^2 over all modules (Frobenius): a relative error, squared.

    Ranks may differ; a missing module counts as zero. Rounding limits the result to about 1e-15. It is infinite if
    only the original is zero.
    """
    return relative(_parts(original, other).values())


def relative(parts: Iterable[tuple[float, float]]) -> float:
    """Return the sum of squared errors divided by the sum of squared norms, in any order."""
    pairs = list(parts)
    return _ratio(math.fsum(error for error, _ in pairs), math.fsum(norm for _, norm in pairs))


@one_thread()
def distance(left: Adapter, right: Adapter) -> float:
    """Return ||dW_left - dW_right|| / max(||dW_left||, ||dW_right||) over all modules: 0 is equal, 2 is opposite.

    A module that one side lacks, or has with other widths, counts as zero there. Rounding limits the result to about
    1e-7, so it is rounded to six decimals: smaller values are 0 on every processor.
    """
    mine, theirs = (
        {(module.name, *module.shape[2:]): _exact(module) for module in adapter.modules} for adapter in (left, right)
    )
    norms = [math.fsum(_inner(module, module) for module in side.values()) for side in (mine, theirs)]
    shared = math.fsum(_inner(module, theirs[key]) for key, module in mine.items() if key in theirs)
    return round(math.sqrt(_ratio(max(math.fsum(norms) - 2.0 * shared, 0.0), max(norms))), _DECIMALS)


@dataclass(frozen=True)
class GroupError:
    """The errors of some adapters in a group of the original's modules.

    Attributes:
        group: Name of the group.
        modules: Number of modules.
        parameters: Number of values in their factors in the original.
        errors: Relative error of each adapter: ||dW' - dW|| / ||dW|| over the group.
    """

    group: str
    modules: int
    parameters: int
    errors: Mapping[str, float]


def errors_by_group(
    original: Adapter, others: Mapping[str, Adapter], group_of: Callable[[str], str]
) -> Sequence[GroupError]:
    """Return the relative errors of some adapters, by name, in each group of the original's modules, largest first.

    `group_of` names the group of a module.
    """
    shapes: dict[str, list[ModuleShape]] = {}
    for shape in original.layout:
        shapes.setdefault(group_of(shape.module), []).append(shape)
    parts = {name: _parts(original, other) for name, other in others.items()}
    found = [
        GroupError(
            group,
            len(members),
            sum(shape.parameters for shape in members),
            {name: math.sqrt(relative(of[shape.module] for shape in members)) for name, of in parts.items()},
        )
        for group, members in shapes.items()
    ]
    return sorted(found, key=lambda entry: (-entry.parameters, entry.group))


def dw_norm(adapter: Adapter) -> float:
    """Return the Frobenius norm of dW over all modules."""
    return total_norm(module_norms(adapter))


def total_norm(norms: Mapping[str, float]) -> float:
    """Return the norm over all modules from the norm of each."""
    return math.sqrt(sum(norm * norm for norm in norms.values()))


@one_thread()
def module_norms(adapter: Adapter) -> dict[str, float]:
    """Return the Frobenius norm of each module's dW."""
    return {module.name: math.sqrt(max(_inner(module, module), 0.0)) for module in map(_exact, adapter.modules)}


@one_thread()
def _parts(original: Adapter, other: Adapter) -> dict[str, tuple[float, float]]:
    """Return per module the squared error and the squared norm of the original."""
    left = {module.name: module for module in original.modules}
    right = {module.name: module for module in other.modules}
    return {name: error_and_norm(left.get(name), right.get(name)) for name in left | right}


def error_and_norm(original: LoraModule | None, other: LoraModule | None) -> tuple[float, float]:
    """Return ||dW_other - dW_original||^2 and ||dW_original||^2 of a module; either side may lack it."""
    # Convert once: converting factors to float64 takes longer than multiplying them.
    mine, theirs = (None if one is None else _exact(one) for one in (original, other))
    norm = _inner(mine, mine) if mine else 0.0
    error = norm + (_inner(theirs, theirs) if theirs else 0.0)
    if mine and theirs:
        error -= 2.0 * _inner(mine, theirs)
    # Equal adapters cancel to rounding noise, which may be negative.
    return max(error, 0.0), norm


def _exact(module: LoraModule) -> LoraModule:
    a, b = (factor.detach().to("cpu", torch.float64) for factor in (module.a, module.b))
    return LoraModule(module.name, a, b)


def _inner(left: LoraModule, right: LoraModule) -> float:
    """Return the inner product of two modules' dW, both in float64."""
    if left.a.shape[1] != right.a.shape[1] or left.b.shape[0] != right.b.shape[0]:
        raise ValueError(f"{left.name} has different widths in the two adapters")
    b, a = left.b.mT @ right.b, left.a @ right.a.mT  # (r_left, r_right)
    return float((b * a).sum())


def _ratio(error: float, norm: float) -> float:
    if norm > 0.0:
        return error / norm
    return 0.0 if error == 0.0 else math.inf
