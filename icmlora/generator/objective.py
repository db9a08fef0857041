"""The loss: how many bits one adapter's code takes.

    bits = bits(z | c) + bits(norms) + bits(token integers | z, c)

Every part is the length of what the codec really writes: integers are rounded as the codec rounds them, and the
quantiser step is chosen per adapter so that the code's squared error is the configured tolerance. The sum is what
storage at that accuracy costs. Rounding has no gradient; `_token_bits` says what replaces it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from icmlora.generator.code_length import bin_bits
from icmlora.generator.cvae import CVAE, INPUTS, OUTPUTS, KindTables, TaskState
from icmlora.generator.initial_a.subspace import InitialSubspace
from icmlora.generator.scales import OCTAVE
from icmlora.generator.sensitivity import Sensitivity
from icmlora.generator.tokens import KindTokens, slot_errors, squared_norm

_Scaled = tuple[torch.Tensor, torch.Tensor]  # values and the scales that they are coded under, of one shape
_PARTS = 16  # groups of channels of about equal weight in `water_level`, where the step need not be exact


@dataclass(frozen=True, eq=False)
class Bits:
    """Estimated code length of one adapter, in bits (differentiable scalars)."""

    latent: torch.Tensor
    norms: torch.Tensor
    tokens: torch.Tensor
    # Not stored: what the norms' gains would cost under the decoder's prediction. It trains what `generate` uses.
    prior: torch.Tensor

    @property
    def total(self) -> torch.Tensor:
        """The loss that training minimises."""
        return self.latent + self.norms + self.tokens + self.prior


@dataclass(frozen=True, eq=False)
class Prepared:
    """Everything about one adapter that does not change while the network is trained; on the network's device."""

    tokens: tuple[KindTokens, ...]
    subspace: InitialSubspace
    sensitivity: Sensitivity
    step: float  # the quantiser step of a code with the configured tolerance

    @property
    def parameters(self) -> int:
        """Number of values in the vectors of all tokens, at least 1."""
        return max(1, sum(group.inputs.numel() + group.outputs.numel() for group in self.tokens))


def prepare(
    tokens: tuple[KindTokens, ...], subspace: InitialSubspace, sensitivity: Sensitivity, tolerance: float
) -> Prepared:
    """Prepare an adapter for `adapter_bits`."""
    return Prepared(tokens, subspace, sensitivity, water_level(tokens, tolerance, sensitivity, subspace))


def adapter_bits(
    net: CVAE,
    adapter: Prepared,
    vectors: Mapping[str, torch.Tensor],
    noise: torch.Generator,
) -> Bits:
    """Estimate the code length of one adapter."""
    # vectors: of one support set by view, each (hidden,); views may be missing. The adapter is on the network's device,
    # `noise` draws on the CPU.
    tokens = adapter.tokens
    condition = _noisy(net.embed(vectors), noise)
    mean, scale = net.latent_prior(condition)
    latent = _noisy(net.posterior(tokens, condition), noise)
    state = TaskState(condition, latent, adapter.subspace)
    tables, gains = net.tables(), net.gains(state).unbind()
    norms = [_norm_bits(tables[group.kind], group, gains[group.kind]) for group in tokens]
    return Bits(
        latent=bin_bits(latent - mean, scale).sum(),
        norms=_bits_of([table for table, _ in norms]),
        tokens=_sum([_token_bits(net, tables[group.kind], group, state, adapter) for group in tokens]),
        prior=_bits_of([gain for _, gain in norms]),
    )


def _token_bits(net: CVAE, table: KindTables, group: KindTokens, state: TaskState, adapter: Prepared) -> torch.Tensor:
    """Return the bits of the integers of one kind's tokens.

    The value is the length under the coder's tables, and its gradient with respect to the predicted scales is exact.
    The gradient with respect to the predicted means is that of unrounded values under a Gaussian widened by the
    rounding error (variance 1/12), which pulls even where everything rounds to zero.
    """
    step, prediction = adapter.step, net.decode(group.kind, group.layer, group.slot, state)
    norm = group.norm[:, None]  # (n, 1)
    # The sign of each pair is the one nearer to the prediction, as in the codec.
    agreement = (group.inputs * prediction.inputs).sum(1) + (group.outputs * prediction.outputs).sum(1)
    sign = torch.where(agreement.detach() < 0, -1.0, 1.0)[:, None]
    inputs, outputs = (
        (values * sign - norm * mean) / step
        for values, mean in zip((group.inputs, group.outputs), (prediction.inputs, prediction.outputs), strict=True)
    )
    along = state.subspace.project(group.kind, group.layer, inputs)
    # Inputs in the initial subspace take r integers instead of one per channel.
    across = inputs - state.subspace.expand(group.kind, group.layer, along, inputs.shape[1])
    scales = [_scale(table, group, side, step, adapter.sensitivity) for side in (INPUTS, OUTPUTS)]
    scales[INPUTS] = scales[INPUTS] * _left(group, state.subspace, across, scales[INPUTS])[:, None]
    known = state.subspace.spread(group.kind, group.layer) * norm / step  # (n, R)
    wholes = [exact.detach().round() for exact in (across, outputs, along)]  # (n, in), (n, out), (n, R)
    given = wholes[INPUTS] + state.subspace.expand(group.kind, group.layer, wholes[2], inputs.shape[1])
    rebuilt = replace(
        group,
        inputs=norm * prediction.inputs.detach() + given * step,
        outputs=norm * prediction.outputs.detach() + wholes[OUTPUTS] * step,
    )
    written = worth_writing(group, rebuilt, (torch.cat([wholes[INPUTS], wholes[2]], dim=1), wholes[OUTPUTS]))
    bits = _bits_of([(whole[written], scale[written]) for whole, scale in zip(wholes, (*scales, known), strict=True)])
    # Its value is subtracted again below: only its gradient counts.
    pull = _sum([_soft(exact, scale) for exact, scale in zip((across, outputs), scales, strict=True)])
    return bits + pull - pull.detach()


def _scale(table: KindTables, group: KindTokens, side: int, step: float, sensitivity: Sensitivity) -> torch.Tensor:
    """Return the scale of each integer of one side as if no initial A were known, shape (n, size)."""
    profile = sensitivity.spreads(group.kind, side)[group.layer]
    spread = torch.exp2(table.spread[side, group.layer, group.slot])[:, None]
    return group.norm[:, None] / math.sqrt(profile.shape[1]) / step * spread * profile


@torch.no_grad()
def _left(group: KindTokens, subspace: InitialSubspace, across: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return the factors of the codec's shifts: how far the values (n, in) of each slot are from their scales, (n,)."""
    # As in `TokenQuantizer.shifts`, modules without a known initial A neither count nor are shifted.
    known = torch.from_numpy(subspace.knows(group.kind)).to(group.layer.device)[group.layer]
    share = torch.where(known, across.square().sum(1) / scale.square().sum(1), 0.0)
    count = torch.bincount(group.slot, weights=known.to(share.dtype))
    mean = torch.zeros_like(count).index_add_(0, group.slot, share) / count.clamp_min(1)
    return torch.where(known, mean[group.slot].clamp_min(2.0**-30).sqrt(), 1.0)


def _soft(exact: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return the bits of unrounded values under a Gaussian widened by the rounding error, up to a constant."""
    return (exact.square() / (2 * math.log(2) * (scale.detach().square() + 1 / 12))).sum()


def worth_writing(group: KindTokens, rebuilt: KindTokens, integers: Sequence[torch.Tensor]) -> torch.Tensor:
    """Say for each slot whether it is worth its bits, so that the codec writes it; shape (n,).

    A slot is worth its bits if both vectors have nonzero integers, or if the prediction alone gives back half of its
    energy. Without the second part, a slot would be lost because it is predicted well.
    """
    coded = (integers[INPUTS] != 0).any(dim=1) & (integers[OUTPUTS] != 0).any(dim=1)
    return coded | (slot_errors(group, rebuilt) < group.norm.square() / 2)


def _norm_bits(table: KindTables, group: KindTokens, predicted: torch.Tensor) -> tuple[_Scaled, _Scaled]:
    """Return the rounded log-norms around table + gain, and that gain around its prediction."""
    offset = group.norm.log2() - table.norm_mean[group.layer, group.slot]
    gain = offset.mean()
    spread = torch.exp2(table.norm_spread[group.slot])
    norms = (offset - gain) * OCTAVE, spread * OCTAVE
    return norms, ((gain - predicted) * OCTAVE, torch.full_like(gain, OCTAVE / 2))


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


def _bits_of(parts: Sequence[_Scaled]) -> torch.Tensor:
    """Return the bits of values under their scales; one call for all of them, as each takes a while for itself."""
    if not parts:
        return torch.zeros(())
    values, scales = (torch.cat([part.reshape(-1) for part in column]) for column in zip(*parts, strict=True))
    return bin_bits(values, scales).sum()


def _sum(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.stack(list(parts)).sum() if parts else torch.zeros(())


def _noisy(values: torch.Tensor, noise: torch.Generator) -> torch.Tensor:
    """Add uniform noise in place of rounding, which keeps the gradient (Ballé et al., arXiv 1611.01704)."""
    return values + (torch.rand(values.shape, generator=noise) - 0.5).to(values.device)
