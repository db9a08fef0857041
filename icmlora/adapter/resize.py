"""Shrink an adapter by cutting ranks, with the smallest error of dW for a given rank or size.

    dW of a module = sum over slots k of  s_k * (out_k, in_k),   s_0 >= s_1 >= ...        (canonical form)

    slot k of a module:   gain s_k^2,   cost (in + out) values   ──▶   all slots of all modules, by gain / cost

Cutting slot k adds exactly s_k^2 to the squared error, because the slots of a module are orthogonal. So the slots with
the most energy per value are kept. Each module keeps one slot even if it does nothing: loaders expect the module in the
file. dW itself (out x in) is never formed.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass, replace

from icmlora.adapter.canonical import canonicalize
from icmlora.adapter.model import Adapter, LoraModule


@dataclass(frozen=True)
class RankedSlots:
    """An adapter in canonical form with its removable slots, least important last.

    Attributes:
        adapter: The adapter with its original ranks.
        order: The module number of each removable slot, in the order of keeping.
        values: Number of values with the first n removable slots and the fixed slot of each module; n from 0 to all.
    """

    adapter: Adapter
    order: tuple[int, ...]
    values: tuple[int, ...]

    @classmethod
    def of(cls, adapter: Adapter) -> RankedSlots:
        """Decompose an adapter."""
        adapter = canonicalize(adapter)
        costs = [module.shape.inputs + module.shape.outputs for module in adapter.modules]
        found: list[tuple[float, int, int]] = []
        for number, module in enumerate(adapter.modules):
            # In canonical form ||A_k|| = ||B_k|| = sqrt(s_k).
            squares = (module.a.double().square().sum(1) * module.b.double().square().sum(0)).tolist()
            # Rounding must not reorder the slots of a module.
            least = math.inf
            for slot, square in enumerate(squares):
                least = min(least, square)
                if slot and square > 0:
                    found.append((-least / costs[number], number, slot))
        order = tuple(number for _, number, _ in sorted(found))
        values = [sum(costs)]
        for number in order:
            values.append(values[-1] + costs[number])
        return cls(adapter, order, tuple(values))

    def first(self, count: int) -> Adapter:
        """Return the best adapter that keeps `count` of the removable slots."""
        ranks = [1] * len(self.adapter.modules)
        for number in self.order[:count]:
            ranks[number] += 1
        return replace(self.adapter, modules=tuple(map(LoraModule.cut, self.adapter.modules, ranks)))

    def within(self, values: float) -> int:
        """Return how many removable slots fit into `values`; 0 even if one slot per module does not fit."""
        return max(0, bisect_right(self.values, values) - 1)
