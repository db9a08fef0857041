"""The adapters that are measured: the largest group of a real fleet with one rank and one start, in some layers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from icmlora.adapter.layout import target_modules
from icmlora.adapter.model import Adapter, LoraModule
from icmlora.formats.discovery.folder import load_adapter
from icmlora.formats.peft.peft import CONFIG_NAME
from icmlora.generator.config import ModuleKind, kind_of
from tests.benchmarks.growth.measured import same_start
from tests.icmlora.small_fleet import MemoryAdapterSource

EVERY = 3
"""Every third layer takes part, to save time."""


@dataclass(frozen=True, eq=False)
class RealGroup:
    """Adapters of one layout and one start.

    Attributes:
        adapters: Their layers count from 0.
        same_start: Share of the adapters of their rank that they are.
    """

    adapters: Sequence[Adapter]
    same_start: float

    def fleet(self) -> MemoryAdapterSource:
        """Return them as a fleet without task vectors."""
        return MemoryAdapterSource([[adapter] for adapter in self.adapters], sets=0)


def real_group(folder: Path) -> RealGroup:
    """Read the group from a folder of adapters: the rank that most have, the kinds that all of these have."""
    found = [load_adapter(path.parent) for path in sorted(folder.glob(f"*/{CONFIG_NAME}"))]
    rank, _ = Counter(adapter.modules[0].shape.rank for adapter in found).most_common(1)[0]
    adapters = [adapter for adapter in found if adapter.modules[0].shape.rank == rank]
    kinds = set.intersection(*({kind_of(shape)[0] for shape in adapter.layout} for adapter in adapters))
    restricted = [_restricted(adapter, kinds) for adapter in adapters]
    group = same_start(restricted, min(kinds))
    return RealGroup(group, len(group) / len(adapters))


def _restricted(adapter: Adapter, kinds: set[ModuleKind]) -> Adapter:
    modules = []
    for module in adapter.modules:
        kind, layer = kind_of(module.shape)
        if kind in kinds and layer % EVERY == 0:
            modules.append(LoraModule(kind.module(layer // EVERY), module.a, module.b))
    return replace(adapter, modules=tuple(modules), target_modules=target_modules(module.name for module in modules))
