"""Add and average adapters through their factors: ranks add up, and dW (out x in) is never formed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

import torch

from icmlora.adapter.canonical import canonicalize
from icmlora.adapter.layout import target_modules
from icmlora.adapter.model import Adapter, LoraModule

# Maximum rank of a running sum before it is truncated: exact for a few dozen tasks, bounded for thousands.
_WORKING_RANK = 256


def plus(left: Adapter, right: Iterable[LoraModule]) -> Adapter:
    """Add the dW of some modules to an adapter."""
    total = {module.name: module for module in left.modules}
    for module in right:
        known = total.get(module.name)
        if known is not None:
            # B A + B' A' = [B B'] [A; A'], exactly: (out, r + r') times (r + r', in).
            a, b = torch.cat([known.a, module.a]), torch.cat([known.b, module.b], dim=1)
            module = LoraModule(module.name, a, b)
        total[module.name] = module
    return with_modules(left, total.values())


def times(modules: Iterable[LoraModule], factor: float) -> list[LoraModule]:
    """Multiply the dW of modules by a number."""
    return [LoraModule(module.name, module.a, factor * module.b) for module in modules]


def with_modules(adapter: Adapter, modules: Iterable[LoraModule]) -> Adapter:
    """Return a copy of an adapter with other modules."""
    chosen = tuple(modules)
    return replace(adapter, modules=chosen, target_modules=target_modules(module.name for module in chosen))


def between(first: Adapter, second: Adapter, part: float) -> Adapter:
    """Interpolate linearly between the factors of an adapter and an adapter trained from it."""
    pairs = zip(first.modules, second.modules, strict=True)
    modules = (LoraModule(one.name, one.a.lerp(two.a, part), one.b.lerp(two.b, part)) for one, two in pairs)
    return replace(first, modules=tuple(modules))


def truncated(adapter: Adapter, rank: int) -> Adapter:
    """Return the best adapter of a smaller rank, in the Frobenius norm of dW."""
    # Canonical slots are sorted by singular value, so the first slots are the best (Eckart and Young).
    return replace(adapter, modules=tuple(module.cut(rank) for module in canonicalize(adapter).modules))


def mean_adapter(adapters: Iterable[Adapter], rank: int) -> Adapter:
    """Return the mean dW, truncated to `rank`, of modules in at least half of the adapters; `ValueError` if empty."""
    # Reads one adapter at a time; a missing module counts as zero.
    total: Adapter | None = None
    owners: Counter[str] = Counter()
    count = 0
    for adapter in adapters:
        count += 1
        owners.update(module.name for module in adapter.modules)
        total = adapter if total is None else plus(total, adapter.modules)
        # Ranks add up with every adapter; occasional truncation bounds memory.
        if max(shape.rank for shape in total.layout) > _WORKING_RANK:
            total = truncated(total, _WORKING_RANK // 2)
    if total is None:
        raise ValueError("there are no adapters to average")
    most = [module for module in total.modules if 2 * owners[module.name] >= count]
    return truncated(with_modules(total, times(most or total.modules, 1 / count)), rank)
