"""Input of one training step: the tokens of some adapters, and all numbers that do not depend on the network.

    adapters ──prepare──▶ tokens in steps ──batched──▶ Batch ──▶ `icmlora.generator.network.objective`
               once for each               for each step

The time of a step on a card depends on its number of operators, so the CPU makes all indices here during another step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch.nn import functional

from icmlora.generator.config import GeneratorConfig
from icmlora.generator.initial_a.subspace import Bases, InitialSubspace, bases_of
from icmlora.generator.network.cvae import VIEWS
from icmlora.generator.network.stack import INPUTS, OUTPUTS, Stack, stacked
from icmlora.generator.network.tokens import KindTokens
from icmlora.generator.network.water_filling import WaterFilling
from icmlora.generator.sensitivity import Sensitivity


@dataclass(frozen=True, eq=False)
class PreparedAdapter:
    """Everything about one adapter that does not change during training; on the CPU."""

    tokens: tuple[KindTokens, ...]  # in quantiser steps
    subspace: InitialSubspace
    step: float  # the quantiser step of a code with the configured tolerance

    @property
    def parameters(self) -> int:
        """Number of values in the vectors of all tokens, at least 1."""
        return max(1, sum(group.inputs.numel() + group.outputs.numel() for group in self.tokens))


def prepare(
    tokens: Sequence[KindTokens], subspace: InitialSubspace, sensitivity: Sensitivity, tolerance: float
) -> PreparedAdapter:
    """Prepare an adapter for batches: its tokens, inputs (n, in) and outputs (n, out), in quantiser steps."""
    step = WaterFilling(tokens, sensitivity, subspace).step(tolerance)
    in_steps = (
        replace(group, norm=group.norm / step, inputs=group.inputs / step, outputs=group.outputs / step)
        for group in tokens
    )
    return PreparedAdapter(tuple(in_steps), subspace, step)


class Subspaces(NamedTuple):
    """The initial subspaces of tokens of the same widths; R is their largest rank."""

    bases: Bases
    spread: torch.Tensor  # scales of the integers along the subspace, shape (n, R)
    known: torch.Tensor  # 1 where the initial A is known, else 0, shape (n,)
    # Tokens of one kind, adapter and slot share one of the codec's shifts; G of them.
    group: torch.Tensor  # int64, shape (n,)
    sizes: torch.Tensor  # number of known tokens in each group, at least 1, shape (G,)

    def left(self, across: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """Return the factors of the codec's shifts: how far the values (n, in) of each slot are from their scales."""
        # As in `TokenQuantizer.shifts`, modules without a known initial A neither count nor are shifted. Shape (n, 1).
        share = across.square().sum(1) / scale.square().sum(1) * self.known
        mean = torch.zeros_like(self.sizes).index_add_(0, self.group, share) / self.sizes
        factor = mean.clamp_min(2.0**-30).sqrt().index_select(0, self.group)
        return torch.where(self.known > 0, factor, 1.0)[:, None]


class Batch(NamedTuple):
    """Input of one step: B adapters of n tokens in all, and numbers that follow from the tokens' places."""

    stack: Stack  # in quantiser steps
    parameters: torch.Tensor  # of each adapter, float32, shape (B,)
    vectors: Mapping[str, torch.Tensor]  # by view, (B, hidden); views that no adapter has are left out
    present: Mapping[str, torch.Tensor]  # which adapters have a view, (B, 1); left out where all have it
    noise: torch.Tensor  # uniform in [-0.5, 0.5), shape (B, C + Z)
    subspaces: tuple[Subspaces | None, ...]  # by widths, as the stack's values; None where no initial A is known
    rows: tuple[torch.Tensor, ...]  # by widths: rows of `Objective`'s tables, int64, shape (n of them,)
    spreads: torch.Tensor  # places in the flat table of spreads, of all inputs, then of all outputs, shape (2n,)
    norm_means: torch.Tensor  # places in the flat table of norms, shape (n,)
    norm_spreads: torch.Tensor  # places in the flat table of their spreads, shape (n,)
    kinds: torch.Tensor  # which of the B * K pairs of adapter and kind a token belongs to, shape (n,)
    kind_counts: torch.Tensor  # tokens of each pair, at least 1, float32, shape (B * K,)
    has_kind: torch.Tensor  # the P pairs that have tokens, shape (P,)
    kind_owners: torch.Tensor  # their adapters, shape (P,)


def batched(
    config: GeneratorConfig,
    adapters: Sequence[PreparedAdapter],
    vectors: Sequence[Mapping[str, torch.Tensor]],
    noise: Sequence[torch.Generator],
) -> Batch:
    """Make a batch of at least one adapter, on the CPU, with one support set of each: vectors (hidden,) by view.

    Views may be missing. `noise` has one CPU generator per adapter.
    """
    stack = stacked([adapter.tokens for adapter in adapters])
    steps = torch.tensor([adapter.step for adapter in adapters])
    stack = stack._replace(log_norm=stack.log_norm + steps.log2()[stack.places.owner])
    _, kind, layer, slot, owner = stack.places
    kinds, layers, slots = len(config.kinds), config.layers, config.slots
    pairs = owner * kinds + kind
    counts = torch.bincount(pairs, minlength=len(adapters) * kinds)
    has_kind = counts.nonzero().squeeze(1)
    # Places are (kind, side, layer, slot) in the table of spreads and (kind, layer, slot) in the table of norms.
    sides = [((2 * kind + side) * layers + layer) * slots + slot for side in (INPUTS, OUTPUTS)]
    # Each token's row in the tables of its widths, which are ordered by kind and layer.
    first = torch.zeros(kinds, dtype=torch.int64)
    for alike in config.by_widths.values():
        first[list(alike)] = torch.arange(len(alike)) * layers
    rows = first[kind] + layer
    views = {view: [found.get(view) for found in vectors] for view in VIEWS}
    present = {view: [one is not None for one in found] for view, found in views.items()}
    return Batch(
        stack=stack,
        parameters=torch.tensor([float(adapter.parameters) for adapter in adapters]),
        vectors={
            view: torch.stack([torch.zeros_like(known[0]) if one is None else one for one in found])
            for view, found in views.items()
            if (known := [one for one in found if one is not None])
        },
        present={view: torch.tensor(has)[:, None] for view, has in present.items() if any(has) and not all(has)},
        noise=torch.stack([torch.rand(config.condition + config.latent, generator=draw) - 0.5 for draw in noise]),
        subspaces=tuple(_subspaces(adapters, values.counts) for values in stack.values),
        rows=torch.split(rows, [len(values.norm) for values in stack.values]) if stack.values else (),
        spreads=torch.cat(sides),
        norm_means=(kind * layers + layer) * slots + slot,
        norm_spreads=kind * slots + slot,
        kinds=pairs,
        kind_counts=counts.clamp_min(1).float(),
        has_kind=has_kind,
        kind_owners=has_kind // kinds,
    )


def _subspaces(adapters: Sequence[PreparedAdapter], counts: Sequence[tuple[int, int]]) -> Subspaces | None:
    """Collect the initial subspaces of tokens of the same widths, in the order of the stack."""
    groups = [
        (adapter.subspace, group)
        for kind, _ in counts
        for adapter in adapters
        for group in adapter.tokens
        if group.kind == kind
    ]
    inputs = groups[0][1].inputs.shape[1]
    bases = bases_of([(subspace, group.kind, group.layer, group.slot) for subspace, group in groups], inputs)
    if bases is None:
        return None
    rank = bases.matrices.shape[1]
    spreads = [subspace.spread(group.kind, group.layer) * group.norm[:, None] for subspace, group in groups]
    is_known = torch.cat([torch.from_numpy(part.knows(group.kind))[group.layer] for part, group in groups]).float()
    shifts = torch.cat([number * bases.slots + group.slot for number, (_, group) in enumerate(groups)])
    return Subspaces(
        bases=bases,
        spread=torch.cat([functional.pad(spread, (0, rank - spread.shape[1])) for spread in spreads]),
        known=is_known,
        group=shifts,
        sizes=torch.bincount(shifts, is_known, minlength=len(groups) * bases.slots).clamp_min(1),
    )
