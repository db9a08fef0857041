"""The loss: how many bits one adapter's code takes.

    bits = bits(z | c) + bits(norms) + bits(token integers | z, c)

Every part is the length of what the codec really writes: integers are rounded as the codec rounds them, and the
quantiser step is chosen per adapter so that the code's squared error is the configured tolerance. The sum is what
storage at that accuracy costs. Rounding has no gradient; `_token_bits` says what replaces it.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from icmlora.generator.code_length import bin_bits
from icmlora.generator.cvae import CVAE, INPUTS, OUTPUTS, Places, TaskState, joined
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
    norms, prior = _norm_bits(net, tokens, net.gains(state).float())  # autocast computes them in bfloat16
    return Bits(
        latent=bin_bits(latent - mean, scale).sum(),
        norms=norms,
        tokens=_sum([_token_bits(net, alike, state, adapter) for alike in _alike(tokens)]),
        prior=prior,
    )


def _alike(tokens: Sequence[KindTokens]) -> list[list[KindTokens]]:
    """Group kinds by their widths: those of one group are computed together, however many there are."""
    groups = defaultdict[tuple[int, int], list[KindTokens]](list)
    for group in tokens:
        groups[group.inputs.shape[1], group.outputs.shape[1]].append(group)
    return list(groups.values())


def _token_bits(net: CVAE, groups: Sequence[KindTokens], state: TaskState, adapter: Prepared) -> torch.Tensor:
    """Return the bits of the integers of tokens, of kinds that have the same widths.

    The value is the length under the coder's tables, and its gradient with respect to the predicted scales is exact.
    The gradient with respect to the predicted means is that of unrounded values under a Gaussian widened by the
    rounding error (variance 1/12), which pulls even where everything rounds to zero.
    """
    tokens, counts = _merged(groups), [len(group.norm) for group in groups]
    step, subspace = adapter.step, state.subspace
    prediction = net.decode([Places(group.kind, group.layer, group.slot) for group in groups], state)
    norm = tokens.norm[:, None]  # (n, 1)
    # The sign of each pair is the one nearer to the prediction, as in the codec.
    agreement = (tokens.inputs * prediction.inputs).sum(1) + (tokens.outputs * prediction.outputs).sum(1)
    sign = torch.where(agreement.detach() < 0, -1.0, 1.0)[:, None]
    inputs, outputs = (
        (values * sign - norm * mean) / step
        for values, mean in zip((tokens.inputs, tokens.outputs), (prediction.inputs, prediction.outputs), strict=True)
    )
    # Inputs in the initial subspace take r integers instead of one per channel; r differs between kinds.
    pairs = list(zip(groups, torch.split(inputs, counts), strict=True))
    along = [subspace.project(group.kind, group.layer, values) for group, values in pairs]
    across = inputs - _expanded(groups, subspace, along, inputs.shape[1])
    scales = [_scale(net, groups, tokens.norm, side, step, adapter.sensitivity) for side in (INPUTS, OUTPUTS)]
    parts = zip(groups, torch.split(across, counts), torch.split(scales[INPUTS], counts), strict=True)
    scales[INPUTS] = scales[INPUTS] * joined([_left(group, subspace, *values) for group, *values in parts])[:, None]
    whole_along = [values.detach().round() for values in along]
    whole = [values.detach().round() for values in (across, outputs)]  # (n, in), (n, out)
    given = whole[INPUTS] + _expanded(groups, subspace, whole_along, inputs.shape[1])
    rebuilt = replace(
        tokens,
        inputs=norm * prediction.inputs.detach() + given * step,
        outputs=norm * prediction.outputs.detach() + whole[OUTPUTS] * step,
    )
    any_along = joined([values.any(dim=1, keepdim=True) for values in whole_along])
    written = worth_writing(tokens, rebuilt, (whole[INPUTS].any(dim=1, keepdim=True) | any_along, whole[OUTPUTS]))
    coded = [(values[written], scale[written]) for values, scale in zip(whole, scales, strict=True)]
    for group, values, mask in zip(groups, whole_along, torch.split(written, counts), strict=True):
        if values.shape[1]:
            known = subspace.spread(group.kind, group.layer) * group.norm[:, None] / step  # (n, R)
            coded.append((values[mask], known[mask]))
    # Its value is subtracted again below: only its gradient counts.
    pull = _sum([_soft(exact, scale) for exact, scale in zip((across, outputs), scales, strict=True)])
    return _bits_of(coded) + pull - pull.detach()


def _merged(groups: Sequence[KindTokens]) -> KindTokens:
    """Concatenate tokens of kinds that have the same widths; what is returned stands for no kind."""
    if len(groups) == 1:
        return groups[0]
    columns = zip(*((part.layer, part.slot, part.norm, part.inputs, part.outputs) for part in groups), strict=True)
    return KindTokens(-1, *(torch.cat(column) for column in columns))


def _expanded(
    groups: Sequence[KindTokens], subspace: InitialSubspace, along: Sequence[torch.Tensor], size: int
) -> torch.Tensor:
    parts = zip(groups, along, strict=True)
    return joined([subspace.expand(group.kind, group.layer, values, size) for group, values in parts])


def _scale(
    net: CVAE, groups: Sequence[KindTokens], norm: torch.Tensor, side: int, step: float, sensitivity: Sensitivity
) -> torch.Tensor:
    """Return the scale of each integer of one side as if no initial A were known, shape (n, size)."""
    profile = joined([sensitivity.spreads(group.kind, side)[group.layer] for group in groups])
    kind, layer, slot = _places(groups)
    spread = torch.exp2(net.spread[kind, side, layer, slot])[:, None]
    return norm[:, None] / math.sqrt(profile.shape[1]) / step * spread * profile


def _places(groups: Sequence[KindTokens]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return kind, layer and slot of all tokens, each of shape (n,)."""
    kind = torch.cat([torch.full_like(group.layer, group.kind) for group in groups])
    return kind, joined([group.layer for group in groups]), joined([group.slot for group in groups])


@torch.no_grad()
def _left(group: KindTokens, subspace: InitialSubspace, across: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return the factors of the codec's shifts: how far the values (n, in) of each slot are from their scales, (n,)."""
    if not subspace.rows(group.kind):
        return torch.ones_like(group.norm)
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


def _norm_bits(net: CVAE, tokens: Sequence[KindTokens], predicted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the bits of the rounded log-norms around table + gain, and of those gains (K,) under the prediction."""
    if not tokens:
        return torch.zeros(()), torch.zeros(())
    kind, layer, slot = _places(tokens)
    offset = joined([group.norm for group in tokens]).log2() - net.norm_mean[kind, layer, slot]
    count = torch.bincount(kind, minlength=len(predicted))
    gain = torch.zeros_like(predicted).index_add(0, kind, offset) / count.clamp_min(1)  # (K,)
    norms = bin_bits((offset - gain[kind]) * OCTAVE, torch.exp2(net.norm_spread[kind, slot]) * OCTAVE).sum()
    missed = (gain - predicted)[count > 0] * OCTAVE
    return norms, bin_bits(missed, torch.full_like(missed, OCTAVE / 2)).sum()


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
    values, scales = (torch.cat([part.reshape(-1) for part in column]) for column in zip(*parts, strict=True))
    return bin_bits(values, scales).sum()


def _sum(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.stack(list(parts)).sum() if parts else torch.zeros(())


def _noisy(values: torch.Tensor, noise: torch.Generator) -> torch.Tensor:
    """Add uniform noise in place of rounding, which keeps the gradient (Ballé et al., arXiv 1611.01704)."""
    return values + (torch.rand(values.shape, generator=noise) - 0.5).to(values.device)
