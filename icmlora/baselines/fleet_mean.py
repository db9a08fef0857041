"""One adapter for all tasks: the mean dW of the fleet, cut to a rank. A task's code is empty, or what the mean lacks.

shared = k strongest directions of mean(B_i A_i);   code = b"", or directions of B A - mean
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from icmlora.adapter import Adapter, LoraModule
from icmlora.baselines.baseline import Baseline, Fleet
from icmlora.baselines.factors import factors_from_bytes, factors_to_bytes
from icmlora.baselines.quantizers import Quantizer
from icmlora.baselines.truncation import truncated
from icmlora.errors import CodeError
from icmlora.layout import target_modules


@dataclass(frozen=True)
class FleetMean:
    """The mean of the fleet's dW, for every task.

    Attributes:
        rank: Directions kept of each module.
        quantizer: How the mean is stored.
        residual: How a task's difference to the mean is stored, a baseline that shares nothing; None stores nothing.
    """

    rank: int
    quantizer: Quantizer
    residual: Baseline | None = None

    # Ranks that a running sum may reach before it is cut: exact for a few dozen tasks, bounded for thousands.
    _WORKING_RANK: ClassVar[int] = 256

    def prepare(self, fleet: Fleet) -> bytes:
        """Store the mean over the modules that at least half of the tasks have; a task without one counts as zero.

        Raises:
            ValueError: The fleet is empty.
        """
        total: Adapter | None = None
        owners: Counter[str] = Counter()
        for adapter in (fleet[task] for task in fleet):
            owners.update(module.name for module in adapter.modules)
            total = adapter if total is None else _with(total, _sum(total.modules, adapter.modules))
            if max(shape.rank for shape in total.layout) > self._WORKING_RANK:
                total = truncated(total, self._WORKING_RANK // 2)
        if total is None:
            raise ValueError("a fleet without adapters has no mean")
        most = [module for module in total.modules if 2 * owners[module.name] >= len(fleet)]
        mean = [LoraModule(module.name, module.a / len(fleet), module.b) for module in most or total.modules]
        return factors_to_bytes(truncated(_with(total, mean), self.rank), self.quantizer)

    def encode(self, adapter: Adapter, shared: bytes) -> bytes:
        """Store what the decoded mean lacks, if anything is stored."""
        if self.residual is None:
            return b""
        mean = _among(factors_from_bytes(shared, self.quantizer), adapter)
        minus = [LoraModule(module.name, -module.a, module.b) for module in mean]
        return self.residual.encode(_with(adapter, _sum(adapter.modules, minus)), b"")

    def decode(self, code: bytes, shared: bytes) -> Adapter:
        """Return the mean, or the mean with a task's difference added, of the modules that the task has."""
        mean = factors_from_bytes(shared, self.quantizer)
        if self.residual is not None:
            difference = self.residual.decode(code, b"")
            return _with(difference, _sum(difference.modules, _among(mean, difference)))
        if code:
            raise CodeError("a task has no code beside the fleet's mean")
        return mean


def _among(mean: Adapter, adapter: Adapter) -> list[LoraModule]:
    """Return the modules of the mean that an adapter has too."""
    own = {module.name for module in adapter.modules}
    return [module for module in mean.modules if module.name in own]


def _sum(left: Iterable[LoraModule], right: Iterable[LoraModule]) -> list[LoraModule]:
    """Add two sets of modules: dW is added, ranks are added."""
    total = {module.name: module for module in left}
    for module in right:
        known = total.get(module.name)
        if known is not None:
            a, b = torch.cat([known.a, module.a]), torch.cat([known.b, module.b], dim=1)
            module = LoraModule(module.name, a, b)
        total[module.name] = module
    return list(total.values())


def _with(adapter: Adapter, modules: list[LoraModule]) -> Adapter:
    return replace(adapter, modules=tuple(modules), target_modules=target_modules(module.name for module in modules))
