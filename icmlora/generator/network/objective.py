"""The loss: the length of some adapters' codes, in bits.

    bits = bits(z | c) + bits(norms) + bits(token integers | z, c)

Every part is the length of the codec's real output: integers are rounded as the codec rounds them, and the quantiser
step is chosen per adapter to give the configured squared error. The sum is the cost of storage at that accuracy.
Rounding has no gradient; `_rounded` describes its replacement.

The time of a step on a card depends on the number of operators, not on their size. So there are no loops over adapters
or layers here, and nothing waits for a result.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from icmlora.generator.network.batch import Batch, Subspaces
from icmlora.generator.network.code_length import bin_bits
from icmlora.generator.network.cvae import CVAE, features_of
from icmlora.generator.network.stack import INPUTS, OUTPUTS, Values, joined
from icmlora.generator.network.tokens import Pairs, slot_errors
from icmlora.generator.scales import OCTAVE


class Bits(NamedTuple):
    """Estimated code lengths of B adapters, in bits: differentiable, each of shape (B,)."""

    latent: torch.Tensor
    norms: torch.Tensor
    tokens: torch.Tensor
    # Not stored: the cost of the norms' gains under the decoder's prediction. It trains the gains for `generate`.
    prior: torch.Tensor

    @property
    def total(self) -> torch.Tensor:
        """The loss that training minimises, (B,)."""
        return self.latent + self.norms + self.tokens + self.prior


class _Rounded(NamedTuple):
    """Tokens of the same widths as integers, with everything that their cost depends on."""

    integers: list[torch.Tensor]  # of each side, and along the initial subspace, shape (n, size)
    scales: list[torch.Tensor]  # that they are coded under, with gradients, of the same shapes
    written: torch.Tensor  # whether a token is worth its bits, shape (n,)
    pull: torch.Tensor  # gives the predicted means a gradient, shape (n,)


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
            for widths, kinds in net.config.by_widths.items()
        }

    def bits(self, batch: Batch) -> Bits:
        """Estimate the code lengths of a batch that is on the network's device, (B,) each."""
        # Uniform noise replaces rounding and keeps the gradient (Ballé et al., arXiv 1611.01704).
        net, config = self._net, self._net.config
        of_condition, of_latent = torch.split(batch.noise, [config.condition, config.latent], dim=1)
        condition = net.condition(batch.vectors, batch.present) + of_condition  # (B, C)
        latent = net.posterior(batch.stack, condition) + of_latent  # (B, Z)
        features = features_of(condition, latent)
        mean, scale = net.latent_prior(condition)
        # The log-norms are coded around table + gain. The gains are compared with the predicted ones.
        above = batch.stack.log_norm - net.norm_mean.flatten().index_select(0, batch.norm_means)  # (n,)
        gain = torch.zeros_like(batch.kind_counts).index_add(0, batch.kinds, above) / batch.kind_counts
        norm_offsets = (above - gain.index_select(0, batch.kinds)) * OCTAVE
        norm_scales = torch.exp2(net.norm_spread.flatten().index_select(0, batch.norm_spreads)) * OCTAVE
        missed = (gain - net.gain(features).flatten()).index_select(0, batch.has_kind) * OCTAVE  # (P,)
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

    def _tokens(self, batch: Batch, features: torch.Tensor) -> torch.Tensor:
        """Return the bits of the integers of all tokens of each adapter, shape (B,)."""
        predictions = iter(self._net.decode(batch.stack.places, features))
        spread = torch.exp2(self._net.spread.flatten().index_select(0, batch.spreads)).view(2, -1)
        levels = torch.split(spread * batch.stack.norm, [len(values.norm) for values in batch.stack.values], dim=1)
        parts = []
        for values, level, row, subspaces in zip(batch.stack.values, levels, batch.rows, batch.subspaces, strict=True):
            mean = [joined(side) for side in zip(*(next(predictions) for _ in values.counts), strict=True)]
            tables = self._tables[values.inputs.shape[1], values.outputs.shape[1]]
            scales = [one[:, None] * table.index_select(0, row) for one, table in zip(level, tables, strict=True)]
            parts.append(_rounded(values, mean, scales, subspaces))
        if not parts:
            return torch.zeros_like(batch.parameters)
        # On a card, selecting the written tokens would wait for a result, so all are computed there.
        chosen = [part.written.nonzero().squeeze(1) if part.written.device.type == "cpu" else None for part in parts]
        pairs = [
            (values, scale) if rows is None else (values.index_select(0, rows), scale.index_select(0, rows))
            for part, rows in zip(parts, chosen, strict=True)
            for values, scale in zip(part.integers, part.scales, strict=True)
        ]
        # One call for all of them, as each call has its overhead.
        flat, scale = (torch.cat([values.flatten() for values in column]) for column in zip(*pairs, strict=True))
        lengths = torch.split(bin_bits(flat, scale), [values.numel() for values, _ in pairs])
        sums = iter([bits.view_as(values).sum(1) for bits, (values, _) in zip(lengths, pairs, strict=True)])
        found = []
        for part, rows in zip(parts, chosen, strict=True):
            bits = torch.stack([next(sums) for _ in part.integers]).sum(0)
            bits = bits * part.written if rows is None else torch.zeros_like(part.pull).index_copy(0, rows, bits)
            found.append(bits + part.pull - part.pull.detach())  # of the pull, only the gradient counts
        return batch.stack.summed(joined(found))


def _rounded(
    tokens: Values, mean: Sequence[torch.Tensor], scales: list[torch.Tensor], subspaces: Subspaces | None
) -> _Rounded:
    """Round tokens as the codec does.

    The gradient with respect to the scales is exact. The gradient with respect to the predicted means comes from
    unrounded values under a Gaussian widened by the rounding error (variance 1/12), so it pulls even where everything
    rounds to zero.
    """
    norm = tokens.norm[:, None]  # (n, 1)
    with torch.no_grad():  # the sign of each pair is the one nearer to the prediction, as in the codec
        agreement = (tokens.inputs * mean[INPUTS]).sum(1) + (tokens.outputs * mean[OUTPUTS]).sum(1)
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
    # The bits of unrounded values under a Gaussian widened by the rounding error, up to a constant.
    weights = [1 / (scale.detach().square().add_(1 / 12).mul_(2 * math.log(2))) for scale in scales]
    of_inputs, of_outputs = ((values.square() * weight).sum(1) for values, weight in zip(exact, weights, strict=True))
    if subspaces is not None:
        scales = [*scales, subspaces.spread]
    return _Rounded(whole, scales, written, of_inputs + of_outputs)


def worth_writing(group: Pairs, rebuilt: Pairs, has_inputs: torch.Tensor, has_outputs: torch.Tensor) -> torch.Tensor:
    """Return for each slot whether it is worth its bits, so the codec writes it; shape (n,).

    A slot is worth its bits if both vectors have nonzero integers (`has_inputs`, `has_outputs`, (n,)), or if the
    prediction alone restores half of its energy. Without the second condition, well-predicted slots would be lost.
    """
    return (has_inputs & has_outputs) | (slot_errors(group, rebuilt) < group.norm.square() / 2)
