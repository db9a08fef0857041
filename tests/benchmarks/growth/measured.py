"""What is measured of real adapters, so that synthetic ones can be made like them.

    dW = sum_i s_i u_i v_i^T      s_i: a mean for each layer and slot; spreads of task, layer and slot
                                  u_i, v_i: partly inside bases that the fleet shares, the rest in directions of its own
                                  u_0, v_0: partly along the first of them, which is what all dW have in common

Adapters that begin from the same random A share most of their input side: the span of their mean A. The statistics are
of such a group. Shares are measured with the task itself left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields

import torch

from icmlora.adapter.canonical import singular_rows
from icmlora.adapter.model import Adapter
from icmlora.generator.config import ModuleKind, kind_of

_SAME_START = 0.3
"""Correlation of two initial matrices A, trained since; of two different ones it is about 0."""


@dataclass(frozen=True, eq=False)
class KindStatistics:
    """Statistics of one module kind: L layers, S rank slots."""

    log_norms: torch.Tensor
    """Mean log2 singular values, shape (L, S)."""
    task_spread: torch.Tensor
    """Spread of what all of a task's norms have in common, in octaves, shape ()."""
    layer_spread: torch.Tensor
    """Spread of what one layer's have in common beyond that, shape ()."""
    slot_spread: torch.Tensor
    """Spread of the rest, shape (S,)."""
    inputs_shared: torch.Tensor
    """Share of the energy of v_i inside the basis of the inputs, shape (S,)."""
    outputs_shared: torch.Tensor
    """The same of u_i, shape (S,)."""
    cosine: torch.Tensor
    """Mean cosine of the dW of two tasks, shape ()."""
    inputs_basis: torch.Tensor
    """Orthonormal columns, the common direction first, then the mean A; shape (L, in, S + 1)."""
    outputs_basis: torch.Tensor
    """The common direction first, then the strongest of the outputs; shape (L, out, S + 1)."""

    def common(self) -> tuple[float, float]:
        """Return the shares of the energy of v_0 and u_0 along the first directions that make the mean cosine.

        The cosine of two tasks is about the product of both shares with the share of energy that slot 0 has. On each
        side the common direction takes the same part of what that side shares.
        """
        energy = torch.exp2(2 * self.log_norms)
        product = float(self.cosine / (energy[:, 0] / energy.sum(1)).mean())
        inputs, outputs = float(self.inputs_shared[0]), float(self.outputs_shared[0])
        part = min(math.sqrt(max(product, 0.0) / (inputs * outputs)), 1.0)
        return part * inputs, part * outputs


Statistics = Mapping[ModuleKind, KindStatistics]


def same_start(adapters: Sequence[Adapter], kind: ModuleKind) -> list[Adapter]:
    """Return the largest group of adapters of one rank whose matrices A come from the same random start."""
    starts = torch.stack([_factors(adapter, kind, [0])[0].flatten() for adapter in adapters])
    alike = torch.corrcoef(starts) > _SAME_START
    members = alike[int(alike.sum(1).argmax())]
    return [adapter for adapter, chosen in zip(adapters, members.tolist(), strict=True) if chosen]


def measure(
    adapters: Sequence[Adapter], kinds: Sequence[ModuleKind], layers: Sequence[int]
) -> dict[ModuleKind, KindStatistics]:
    """Measure adapters of one rank that come from the same start.

    Args:
        adapters: At least three; all hold the kinds in all layers.
        kinds: Which kinds.
        layers: Which layers; they count from 0 in the result.
    """
    found = {}
    for kind in kinds:
        factors = [_factors(adapter, kind, layers) for adapter in adapters]
        raw_a, raw_b = (torch.stack(side) for side in zip(*factors, strict=True))
        found[kind] = _measure_kind(raw_a, raw_b)
    return found


def to_tensors(statistics: Statistics) -> dict[str, torch.Tensor]:
    """Flatten statistics for a tensor file."""
    named = ((kind, field.name) for kind in statistics for field in fields(KindStatistics))
    return {f"{kind.pattern}/{name}": getattr(statistics[kind], name).contiguous() for kind, name in named}


def from_tensors(tensors: Mapping[str, torch.Tensor]) -> dict[ModuleKind, KindStatistics]:
    """Read back what `to_tensors` made."""
    names = [field.name for field in fields(KindStatistics)]
    found = {}
    for pattern in sorted({key.rpartition("/")[0] for key in tensors}):
        parts = KindStatistics(*(tensors[f"{pattern}/{name}"] for name in names))
        found[ModuleKind(pattern, parts.inputs_basis.shape[1], parts.outputs_basis.shape[1])] = parts
    return found


def balance(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Balance factor pairs of one shape, a (n, r, in) and b (n, out, r), in float32; r is at most a width then."""
    _, rows_a, rows_b = singular_rows(a.double(), b.mT.double(), power=0.5)
    return rows_a.float(), rows_b.mT.float()


def _factors(adapter: Adapter, kind: ModuleKind, layers: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    places = ((*kind_of(module.shape), module) for module in adapter.modules)
    modules = {layer: module for found, layer, module in places if found == kind}
    return torch.stack([modules[layer].a for layer in layers]), torch.stack([modules[layer].b for layer in layers])


def _measure_kind(raw_a: torch.Tensor, raw_b: torch.Tensor) -> KindStatistics:
    """Measure the factors of T adapters as they were trained, (T, L, S, in) and (T, L, out, S)."""
    a, b = balance(raw_a.flatten(0, 1), raw_b.flatten(0, 1))
    a, b = a.reshape(raw_a.shape), b.reshape(raw_b.shape)
    norms = a.square().sum(3)  # (T, L, S): |a_i| = |b_i| = sqrt(s_i)
    inputs, outputs = a.mT * norms.sqrt()[:, :, None], b * norms.sqrt()[:, :, None]  # columns s_i v_i and s_i u_i
    first_a, first_b = _common_pair(a, b)
    starts = (raw_a / raw_a.norm(dim=(2, 3), keepdim=True)).mT  # (T, L, in, S)
    bases = _led_by(first_a, starts.mean(0, keepdim=True)), _led_by(first_b, outputs)
    shared = _shared(inputs, lambda others: starts[others].mean(0, keepdim=True)), _shared(outputs, outputs.__getitem__)
    table, task, layer, slot = _spreads(norms.log2())
    return KindStatistics(table, task, layer, slot, *shared, _mean_cosine(a, b), *bases)


def _spreads(logs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the mean of log2 norms (T, L, S) over tasks, and the spreads of task, layer and slot around it."""
    table = logs.mean(0)
    rest = logs - table
    task = rest.mean((1, 2), keepdim=True)
    layer = (rest - task).mean(2, keepdim=True)
    return table, task.std(), layer.std(), (rest - task - layer).std((0, 1))


def _basis(columns: torch.Tensor) -> torch.Tensor:
    """Return the directions that hold most of some tasks' columns, (T, L, width, S) -> (L, width, S)."""
    count = columns.shape[3]
    side_by_side = torch.cat(list(columns), dim=2)  # (L, width, T S)
    left: torch.Tensor = torch.linalg.svd(side_by_side, full_matrices=False)[0]
    return left[:, :, :count]


def _shared(columns: torch.Tensor, source: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Return which share of each slot's energy lies in a basis that the other tasks give, shape (S,).

    Args:
        columns: Shape (T, L, width, S).
        source: From a mask of tasks to the columns that make the basis.
    """
    shares = []
    for task in range(len(columns)):
        basis = _basis(source(torch.arange(len(columns)) != task))
        inside = (basis.mT @ columns[task]).square().sum(1)  # (L, S)
        shares.append((inside / columns[task].square().sum(1)).mean(0))
    return torch.stack(shares).mean(0)


def _mean_cosine(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return the mean cosine of the dW of two tasks, over all pairs and layers."""
    inner = torch.einsum("tlri,ulsi->tulrs", a, a) * torch.einsum("tlor,ulos->tulrs", b, b)
    gram = inner.sum((3, 4)).permute(2, 0, 1)  # (L, T, T)
    length = gram.diagonal(dim1=1, dim2=2).sqrt()
    cosine = gram / length[:, :, None] / length[:, None]
    pairs = ~torch.eye(len(a), dtype=torch.bool)
    return cosine[:, pairs].mean()


def _common_pair(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the first singular vectors of the mean of dW / |dW|, of shapes (L, in, 1) and (L, out, 1)."""
    size = a.square().sum(3).square().sum(2).sqrt()  # (T, L): |dW|
    mean_a, mean_b = balance(torch.cat(list(a), dim=1), torch.cat(list(b / size[:, :, None, None]), dim=2))
    first_a, first_b = mean_a[:, :1].mT, mean_b[:, :, :1]
    return first_a / first_a.norm(dim=1, keepdim=True), first_b / first_b.norm(dim=1, keepdim=True)


def _led_by(first: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Return a basis that begins with one direction, (L, width, 1), and goes on with the strongest of the rest."""
    rest = columns - first @ (first.mT @ columns)
    return torch.cat([first, _basis(rest)], dim=2)
