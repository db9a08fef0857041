"""The loss: how many bits the codes of some adapters take.

    bits = bits(z | c) + bits(norms) + bits(token integers | z, c)

Every part is the length of what the codec really writes: integers are rounded as the codec rounds them, and the
quantiser step is chosen per adapter so that the code's squared error is the configured tolerance. The sum is what
storage at that accuracy costs. Rounding has no gradient; `Objective._rounded` says what replaces it.

    adapters ──prepare──▶ tokens in steps ──batched──▶ Batch ──Objective.bits──▶ bits of each adapter, with gradients
               once for each               for each step; indices that do not depend on the network are made here

A step on a card takes as long as it has operations, however small they are. So there are no loops over adapters or
layers below, and nothing waits for a result.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch.nn import functional

from icmlora.generator.code_length import bin_bits
from icmlora.generator.config import GeneratorConfig
from icmlora.generator.cvae import CVAE, VIEWS, Prediction, features_of
from icmlora.generator.initial_a.subspace import Bases, InitialSubspace, bases_of
from icmlora.generator.scales import OCTAVE
from icmlora.generator.sensitivity import Sensitivity
from icmlora.generator.stack import INPUTS, OUTPUTS, Stack, Values, joined, stacked
from icmlora.generator.tokens import KindTokens, Pairs, slot_errors, squared_norm

_PARTS = 16  # groups of channels of about equal weight in `water_level`, where the step need not be exact


class Bits(NamedTuple):
    """Estimated code lengths of B adapters, in bits: differentiable, each of shape (B,)."""

    latent: torch.Tensor
    norms: torch.Tensor
    tokens: torch.Tensor
    # Not stored: what the norms' gains would cost under the decoder's prediction. It trains what `generate` uses.
    prior: torch.Tensor

    @property
    def total(self) -> torch.Tensor:
        """The loss that training minimises, (B,)."""
        return self.latent + self.norms + self.tokens + self.prior


@dataclass(frozen=True, eq=False)
class Prepared:
    """Everything about one adapter that does not change while the network is trained; on the CPU."""

    tokens: tuple[KindTokens, ...]  # in quantiser steps
    subspace: InitialSubspace
    step: float  # the quantiser step of a code with the configured tolerance

    @property
    def parameters(self) -> int:
        """Number of values in the vectors of all tokens, at least 1."""
        return max(1, sum(group.inputs.numel() + group.outputs.numel() for group in self.tokens))


def prepare(
    tokens: Sequence[KindTokens], subspace: InitialSubspace, sensitivity: Sensitivity, tolerance: float
) -> Prepared:
    """Prepare an adapter for batches."""
    step = water_level(tokens, tolerance, sensitivity, subspace)
    in_steps = (
        replace(group, norm=group.norm / step, inputs=group.inputs / step, outputs=group.outputs / step)
        for group in tokens
    )
    return Prepared(tuple(in_steps), subspace, step)


class Subspaces(NamedTuple):
    """The initial subspaces of tokens of the same widths; R is their largest rank."""

    bases: Bases
    spread: torch.Tensor  # scales of the integers along the subspace, shape (n, R)
    known: torch.Tensor  # 1 where the initial A is known, else 0, shape (n,)
    # Tokens of one kind, adapter and slot share one of the codec's shifts; G of them.
    group: torch.Tensor  # int64, shape (n,)
    sizes: torch.Tensor  # number of known tokens of each, at least 1, shape (G,)

    def left(self, across: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """Return the factors of the codec's shifts: how far the values (n, in) of each slot are from their scales."""
        # As in `TokenQuantizer.shifts`, modules without a known initial A neither count nor are shifted. Shape (n, 1).
        share = across.square().sum(1) / scale.square().sum(1) * self.known
        mean = torch.zeros_like(self.sizes).index_add_(0, self.group, share) / self.sizes
        factor = mean.clamp_min(2.0**-30).sqrt().index_select(0, self.group)
        return torch.where(self.known > 0, factor, 1.0)[:, None]


class Batch(NamedTuple):
    """What one step sees: B adapters of n tokens in all, and numbers that follow from where the tokens are."""

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
    adapters: Sequence[Prepared],
    vectors: Sequence[Mapping[str, torch.Tensor]],
    noise: Sequence[torch.Generator],
) -> Batch:
    """Make a batch of adapters, on the CPU.

    Args:
        config: The network's.
        adapters: At least one.
        vectors: Of each adapter, one support set by view, each (hidden,); views may be missing.
        noise: Of each adapter, draws on the CPU.
    """
    stack = stacked([adapter.tokens for adapter in adapters])
    steps = torch.tensor([adapter.step for adapter in adapters])
    stack = stack._replace(log_norm=stack.log_norm + steps.log2()[stack.places.owner])
    _, kind, layer, slot, owner = stack.places
    kinds, layers, slots = len(config.kinds), config.layers, config.slots
    pairs = owner * kinds + kind
    counts = torch.bincount(pairs, minlength=len(adapters) * kinds)
    has_kind = counts.nonzero().squeeze(1)
    # A place in the table of spreads is (kind, side, layer, slot), in that of norms (kind, layer, slot).
    sides = [((2 * kind + side) * layers + layer) * slots + slot for side in (INPUTS, OUTPUTS)]
    views = {view: [found.get(view) for found in vectors] for view in VIEWS}
    present = {view: [one is not None for one in found] for view, found in views.items()}
    return Batch(
        stack=stack,
        parameters=torch.tensor([float(adapter.parameters) for adapter in adapters]),
        vectors={view: _filled(found) for view, found in views.items() if any(present[view])},
        present={view: torch.tensor(has)[:, None] for view, has in present.items() if any(has) and not all(has)},
        noise=torch.stack([torch.rand(config.condition + config.latent, generator=draw) - 0.5 for draw in noise]),
        subspaces=tuple(_subspaces(adapters, values.counts) for values in stack.values),
        rows=_table_rows(config, stack),
        spreads=torch.cat(sides),
        norm_means=(kind * layers + layer) * slots + slot,
        norm_spreads=kind * slots + slot,
        kinds=pairs,
        kind_counts=counts.clamp_min(1).float(),
        has_kind=has_kind,
        kind_owners=has_kind // kinds,
    )


def _filled(found: Sequence[torch.Tensor | None]) -> torch.Tensor:
    """Stack vectors (hidden,), with zeros for those that are missing."""
    some = next(one for one in found if one is not None)
    return torch.stack([torch.zeros_like(some) if one is None else one for one in found])


def _table_rows(config: GeneratorConfig, stack: Stack) -> tuple[torch.Tensor, ...]:
    """Return the row of each token in the tables of its widths, which have the layers of one kind after the other."""
    first = torch.tensor([0] * len(config.kinds))
    for kinds in _by_widths(config).values():
        first[kinds] = torch.arange(len(kinds)) * config.layers
    rows = first[stack.places.kind] + stack.places.layer
    return torch.split(rows, [len(values.norm) for values in stack.values]) if stack.values else ()


def _by_widths(config: GeneratorConfig) -> dict[tuple[int, int], list[int]]:
    kinds = defaultdict[tuple[int, int], list[int]](list)
    for number, kind in enumerate(config.kinds):
        kinds[kind.inputs, kind.outputs].append(number)
    return dict(kinds)


def _subspaces(adapters: Sequence[Prepared], counts: Sequence[tuple[int, int]]) -> Subspaces | None:
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


class _Rounded(NamedTuple):
    """Tokens of the same widths as integers, and what they cost."""

    integers: list[torch.Tensor]  # of each side, and along the initial subspace, shape (n, size)
    scales: list[torch.Tensor]  # that they are coded under, with gradients, of the same shapes
    written: torch.Tensor  # whether a token is worth its bits, shape (n,)
    pull: torch.Tensor  # what gives the predicted means a gradient, shape (n,)


class Objective:
    """The loss of one network, with tables that no step changes."""

    def __init__(self, net: CVAE) -> None:
        self._net = net
        sensitivity = net.sensitivity
        # By widths and side: 2^profile / sqrt(size) of each channel, shape (kinds * L, size).
        self._tables = {
            widths: [
                torch.cat([torch.exp2(sensitivity.profile(kind, side)) for kind in kinds]) / math.sqrt(size)
                for side, size in enumerate(widths)
            ]
            for widths, kinds in _by_widths(net.config).items()
        }

    def bits(self, batch: Batch) -> Bits:
        """Estimate the code lengths of a batch that is on the network's device."""
        # Uniform noise takes the place of rounding, which keeps the gradient (Ballé et al., arXiv 1611.01704).
        net, config = self._net, self._net.config
        of_condition, of_latent = torch.split(batch.noise, [config.condition, config.latent], dim=1)
        condition = net.embed(batch.vectors, batch.present) + of_condition  # (B, C)
        latent = net.posterior(batch.stack, condition) + of_latent  # (B, Z)
        features = features_of(condition, latent)
        mean, scale = net.latent_prior(condition)
        norm_offsets, norm_scales, missed = self._norms(batch, net.gains(features))
        values = torch.cat([(latent - mean).flatten(), norm_offsets, missed])
        scales = torch.cat([scale.flatten(), norm_scales, torch.full_like(missed, OCTAVE / 2)])
        sizes = [latent.numel(), len(norm_offsets), len(missed)]
        of_latents, of_norms, of_gains = torch.split(bin_bits(values, scales), sizes)
        return Bits(
            latent=of_latents.view_as(latent).sum(1),
            norms=batch.stack.summed(of_norms),
            tokens=self._tokens(batch, features),
            prior=torch.zeros_like(batch.parameters).index_add(0, batch.kind_owners, of_gains),
        )

    def _norms(self, batch: Batch, predicted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the log-norms around table + gain (n,), their scales, and the gains around the predicted ones (P,)."""
        net = self._net
        offset = batch.stack.log_norm - net.norm_mean.flatten().index_select(0, batch.norm_means)
        gain = torch.zeros_like(batch.kind_counts).index_add(0, batch.kinds, offset) / batch.kind_counts
        spread = torch.exp2(net.norm_spread.flatten().index_select(0, batch.norm_spreads))
        missed = (gain - predicted.flatten()).index_select(0, batch.has_kind)
        return (offset - gain.index_select(0, batch.kinds)) * OCTAVE, spread * OCTAVE, missed * OCTAVE

    def _tokens(self, batch: Batch, features: torch.Tensor) -> torch.Tensor:
        """Return the bits of the integers of all tokens of each adapter, shape (B,)."""
        parts = list(self._parts(batch, features))
        if not parts:
            return torch.zeros_like(batch.parameters)
        # A card would have to wait until it is known which tokens are written, so there all are computed.
        chosen = [part.written.nonzero().squeeze(1) if part.written.device.type == "cpu" else None for part in parts]
        pairs = [
            (values, scale) if rows is None else (values.index_select(0, rows), scale.index_select(0, rows))
            for part, rows in zip(parts, chosen, strict=True)
            for values, scale in zip(part.integers, part.scales, strict=True)
        ]
        # One call for all of them, as each takes a while for itself.
        flat, scales = (torch.cat([values.flatten() for values in column]) for column in zip(*pairs, strict=True))
        lengths = torch.split(bin_bits(flat, scales), [values.numel() for values, _ in pairs])
        sums = iter([bits.view_as(values).sum(1) for bits, (values, _) in zip(lengths, pairs, strict=True)])
        found = []
        for part, rows in zip(parts, chosen, strict=True):
            bits = torch.stack([next(sums) for _ in part.integers]).sum(0)
            bits = bits * part.written if rows is None else torch.zeros_like(part.pull).index_copy(0, rows, bits)
            found.append(bits + part.pull - part.pull.detach())  # of the pull, only the gradient counts
        return batch.stack.summed(joined(found))

    def _parts(self, batch: Batch, features: torch.Tensor) -> Iterator[_Rounded]:
        predictions = iter(self._net.decode(batch.stack.places, features))
        spread = torch.exp2(self._net.spread.flatten().index_select(0, batch.spreads)).view(2, -1)
        levels = torch.split(spread * batch.stack.norm, [len(values.norm) for values in batch.stack.values], dim=1)
        for values, level, rows, subspaces in zip(batch.stack.values, levels, batch.rows, batch.subspaces, strict=True):
            of_kinds = [next(predictions) for _ in values.counts]
            mean = Prediction(*(joined(side) for side in zip(*of_kinds, strict=True)))
            tables = self._tables[values.inputs.shape[1], values.outputs.shape[1]]
            scales = [one[:, None] * table.index_select(0, rows) for one, table in zip(level, tables, strict=True)]
            yield _rounded(values, mean, scales, subspaces)


def _rounded(tokens: Values, mean: Prediction, scales: list[torch.Tensor], subspaces: Subspaces | None) -> _Rounded:
    """Round tokens as the codec does.

    The gradient with respect to the scales is exact. The gradient with respect to the predicted means is that of
    unrounded values under a Gaussian widened by the rounding error (variance 1/12), which pulls even where everything
    rounds to zero.
    """
    norm = tokens.norm[:, None]  # (n, 1)
    with torch.no_grad():  # the sign of each pair is the one nearer to the prediction, as in the codec
        agreement = (tokens.inputs * mean.inputs).sum(1) + (tokens.outputs * mean.outputs).sum(1)
        sign = torch.where(agreement < 0, -1.0, 1.0)[:, None]
        signed = tokens.inputs * sign, tokens.outputs * sign
    exact = [torch.addcmul(value, norm, one, value=-1) for value, one in zip(signed, mean, strict=True)]
    along = torch.zeros(0)
    if subspaces is not None:
        # Inputs in the initial subspace take R integers instead of one per channel.
        along = subspaces.bases.project(exact[INPUTS])
        exact[INPUTS] = exact[INPUTS] - subspaces.bases.expand(along)
        with torch.no_grad():
            left = subspaces.left(exact[INPUTS], scales[INPUTS])
        scales = [scales[INPUTS] * left, scales[OUTPUTS]]
    with torch.no_grad():
        whole = [values.round() for values in exact]
        given, nonzero = list(whole), [values.any(dim=1) for values in whole]
        if subspaces is not None:
            whole.append(along.round())
            given[INPUTS] = whole[INPUTS] + subspaces.bases.expand(whole[-1])
            nonzero[INPUTS] = nonzero[INPUTS] | whole[-1].any(dim=1)
        rebuilt = [torch.addcmul(values, norm, one) for values, one in zip(given, mean, strict=True)]
        written = worth_writing(tokens, tokens._replace(inputs=rebuilt[INPUTS], outputs=rebuilt[OUTPUTS]), *nonzero)
    pull = sum(_soft(values, scale) for values, scale in zip(exact, scales, strict=True))
    assert isinstance(pull, torch.Tensor)
    if subspaces is not None:
        scales = [*scales, subspaces.spread]
    return _Rounded(whole, scales, written, pull)


def _soft(exact: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return the bits of rows of unrounded values under a Gaussian widened by the rounding error, up to a constant."""
    weight = 1 / (scale.detach().square().add_(1 / 12).mul_(2 * math.log(2)))
    return (exact.square() * weight).sum(1)


def worth_writing(group: Pairs, rebuilt: Pairs, has_inputs: torch.Tensor, has_outputs: torch.Tensor) -> torch.Tensor:
    """Say for each slot whether it is worth its bits, so that the codec writes it; shape (n,).

    A slot is worth its bits if both vectors have nonzero integers (`has_inputs`, `has_outputs`, (n,)), or if the
    prediction alone gives back half of its energy. Without the second part, a slot would be lost because it is
    predicted well.
    """
    return (has_inputs & has_outputs) | (slot_errors(group, rebuilt) < group.norm.square() / 2)


def water_level(
    tokens: Sequence[KindTokens], tolerance: float, sensitivity: Sensitivity, subspace: InitialSubspace
) -> float:
    """Return the quantiser step whose expected squared error is `tolerance` (1 for an adapter of zeros).

    A coefficient of variance v contributes min(v, step^2 / 12): reverse water-filling (Cover and Thomas, 10.3.3).
    """
    if not tokens:
        return 1.0
    parts = [_variances(group, side, sensitivity, subspace) for group in tokens for side in (INPUTS, OUTPUTS)]
    variance, count = (torch.cat(column) for column in zip(*parts, strict=True))
    allowed = tolerance * squared_norm(tokens)
    low, high = -40.0, 40.0  # log2 of the step
    for _ in range(50):
        middle = (low + high) / 2
        error = float((torch.clamp(variance, max=4.0**middle / 12) * count).sum())
        low, high = (middle, high) if error < allowed else (low, middle)
    return float(2.0**low)


def _variances(
    group: KindTokens, side: int, sensitivity: Sensitivity, subspace: InitialSubspace
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the variances of a side's coefficients and how many coefficients have each of them.

    Channels are grouped by weight, a sixteenth at a time. Inputs along the subspace are left out: they take next to no
    bits, so they lose next to nothing.
    """
    size = (group.inputs, group.outputs)[side].shape[1]
    square = torch.exp2(2 * sensitivity.profile(group.kind, side)).double().sort(dim=1).values  # (L, size)
    share = torch.stack([part.mean(dim=1) for part in square.tensor_split(min(_PARTS, size), dim=1)], dim=1)
    counts = torch.tensor(  # channels in each group
        [len(part) for part in torch.arange(size).tensor_split(min(_PARTS, size))], device=square.device
    )
    share = share / (share * counts).sum(dim=1, keepdim=True)  # (L, parts); one row's variances add up to 1
    energy = group.norm.double().square()
    if side == INPUTS:
        energy = energy - subspace.project(group.kind, group.layer, group.inputs).double().square().sum(1)
    variance = energy.clamp_min(0)[:, None] * share[group.layer]
    return variance.flatten(), counts.double().expand_as(variance).flatten()
