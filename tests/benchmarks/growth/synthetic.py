"""A fleet of any size with the statistics of a measured one: each adapter is made from its number when it is asked for.

    dW = sum_i s_i u_i v_i^T    v_i = sqrt(share_i) (inside the shared basis) + sqrt(1 - share_i) (outside of it)
                                v_0 has a fixed part along the basis' first direction; u_i and u_0 likewise

A task with a start of its own has a random basis of the inputs in the place of the shared one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from icmlora.adapter.layout import target_modules
from icmlora.adapter.model import Adapter, LoraModule
from tests.benchmarks.adapters_alone import AdaptersAlone
from tests.benchmarks.growth.measured import KindStatistics, Statistics

UNSEEN = 1_000_000
"""Tasks from this number on are in no fleet."""


@dataclass(frozen=True, eq=False)
class SyntheticAdapterSource(AdaptersAlone):
    """Implements `icmlora.training.source.AdapterSource`; without task vectors and checkpoints.

    Attributes:
        statistics: By module kind.
        count: Number of tasks.
        same_start: Share of the tasks that have the measured start of the inputs.
        seed: Another seed is another fleet of the same statistics.
        base: Label of the base model.
    """

    statistics: Statistics
    count: int
    same_start: float = 1.0
    seed: int = 0
    base: str = "synthetic"

    def tasks(self) -> int:
        """Return the number of tasks."""
        return self.count

    def load(self, task: int, checkpoint: int | None) -> Adapter:
        """Make an adapter; the same number always gives the same one."""
        draw = torch.Generator().manual_seed(self.seed * 2 * UNSEEN + task)
        shares_start = bool(torch.rand((), generator=draw) < self.same_start)
        modules = []
        for kind, measured in self.statistics.items():
            for layer, (a, b) in enumerate(zip(*_factors(measured, shares_start, draw), strict=True)):
                modules.append(LoraModule(kind.module(layer), a, b))
        names = target_modules(module.name for module in modules)
        return Adapter(self.base, "CAUSAL_LM", names, tuple(modules))


def _factors(measured: KindStatistics, shares_start: bool, draw: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Make one kind of one task: (L, S, in) and (L, out, S)."""
    layers, slots = measured.log_norms.shape
    task, layer, slot = (torch.randn(size, generator=draw) for size in ((1, 1), (layers, 1), (layers, slots)))
    spread = task * measured.task_spread + layer * measured.layer_spread + slot * measured.slot_spread
    norms = torch.exp2(measured.log_norms + spread).sort(dim=1, descending=True).values  # (L, S)
    basis = measured.inputs_basis if shares_start else _orthonormal(measured.inputs_basis.shape, draw)
    common_inputs, common_outputs = measured.common()
    v = _vectors(measured.inputs_shared, common_inputs, basis, draw)  # (L, in, S)
    u = _vectors(measured.outputs_shared, common_outputs, measured.outputs_basis, draw)
    root = norms.sqrt()[:, None]  # (L, 1, S)
    return (v * root).mT, u * root


def _vectors(shares: torch.Tensor, common: float, basis: torch.Tensor, draw: torch.Generator) -> torch.Tensor:
    """Draw orthonormal columns of which given shares (S,) lie in a basis (L, width, D), D >= S.

    The first column has the share `common` of its energy along the basis' first direction, always with the same sign.
    """
    layers, width, dimensions = basis.shape
    mixing = torch.randn((layers, dimensions, len(shares)), generator=draw)
    along = min(common / float(shares[0]), 1.0)
    others = mixing[:, 1:, 0]
    mixing[:, 0, 0] = math.sqrt(along)
    mixing[:, 1:, 0] = math.sqrt(1 - along) * others / others.norm(dim=1, keepdim=True)
    mixing = torch.linalg.qr(mixing)[0]
    inside = basis @ (mixing * torch.where(mixing[:, :1, :1] < 0, -1.0, 1.0))
    random = torch.randn((layers, width, len(shares)), generator=draw)
    outside = torch.linalg.qr(random - basis @ (basis.mT @ random))[0]
    columns: torch.Tensor = inside * shares.sqrt() + outside * (1 - shares).sqrt()
    return columns


def _orthonormal(shape: torch.Size, draw: torch.Generator) -> torch.Tensor:
    columns: torch.Tensor = torch.linalg.qr(torch.randn(shape, generator=draw))[0]
    return columns
