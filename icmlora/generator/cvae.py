"""The conditional variational autoencoder over adapter tokens, after ICM-LoRA (arXiv 2501.17635).

The paper's CVAE flattens one adapter into one vector. Here it is token-wise, so one network serves mixed ranks and
module kinds, and it is built as a mean-and-scale hyperprior (Minnen et al., arXiv 1809.02736), so that its loss is the
length of the stored code in bits:

    task vectors c ──ConditionNet──▶ condition e (C) ──prior p(z|e)──▶ mean, scale of z
                                          │                                 │ z = mean: `generate`
    tokens w ──encoder q(z|w,e)──▶ z (Z) ─┼──quantised, stored ─────────────┤
                                          ▼                                 ▼
                       decoder p(w|z,e): per token (kind, layer, slot) a mean direction and a scale
                                          │
    (w - mean) / step ──rounded──▶ integers, entropy-coded under the predicted scale: the rest of the code

Notation: K kinds, L layers, S slots, E embedding, H width, C condition, Z latent, n tokens of one kind.

`predicted_tokens` makes tokens without a code, for `generate`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.functional import silu

from icmlora.generator.config import GeneratorConfig
from icmlora.generator.initial_a.subspace import InitialSubspace
from icmlora.generator.scales import OCTAVE
from icmlora.generator.sensitivity import Sensitivity
from icmlora.generator.tokens import KindTokens

VIEWS = ("adapted", "context")
INPUTS, OUTPUTS = 0, 1  # the sides of a token

# Condition and latent are integers of one byte; the network sees them divided by this, so that a byte covers about +-8.
_GRID = 16.0
_BYTE = 127.0


@dataclass(frozen=True, eq=False)
class TaskState:
    """What the decoder knows about a task: two vectors of integers in [-127, 127], and where its training began."""

    condition: torch.Tensor  # shape (C,)
    latent: torch.Tensor  # shape (Z,)
    subspace: InitialSubspace  # directions of its inputs that cost nothing to store


@dataclass(frozen=True, eq=False)
class Prediction:
    """The decoder's mean for the tokens of one kind, as directions: multiply them by the tokens' norms."""

    inputs: torch.Tensor  # shape (n, in)
    outputs: torch.Tensor  # shape (n, out)


class Places(NamedTuple):
    """Where n tokens of one kind are."""

    kind: int
    layer: torch.Tensor  # int64, shape (n,)
    slot: torch.Tensor  # int64, shape (n,)


class CVAE(nn.Module):
    """TokenEncoder, prior and decoder of one fleet (picture above). All sizes come from `GeneratorConfig`."""

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__()
        self.config = config
        kinds, layers, slots, width = len(config.kinds), config.layers, config.slots, config.width
        self.condition = ConditionNet(config)
        self.encoder = TokenEncoder(config)
        self.prior = nn.Linear(config.condition, 2 * config.latent)  # mean and log scale of z
        nn.init.zeros_(self.prior.weight)
        nn.init.zeros_(self.prior.bias)

        # The decoder reads a token's place: embeddings of its layer, slot and (kind, side) in one row, (n, 3E).
        self.layer = nn.Embedding(layers, config.embedding)
        self.slot = nn.Embedding(slots, config.embedding)
        self.factor = nn.Embedding(2 * kinds, config.embedding)
        task = config.condition + config.latent
        self.enter = nn.Linear(3 * config.embedding + task, width)
        self.mix = nn.Linear(width, width)
        self.modulate = nn.Linear(task, width)
        self.leave = nn.Linear(width, width)
        # Predictions over channels have rank H: hidden (n, H) times directions (H, size).
        shapes = [(kind.inputs, kind.outputs) for kind in config.kinds]
        self.directions = nn.ParameterList([torch.zeros(width, size) for pair in shapes for size in pair])
        # log2 of a token's norm: a table over (kind, layer, slot) plus one gain per kind that depends on the task.
        self.norm_mean = nn.Parameter(torch.zeros(kinds, layers, slots))
        self.norm_spread = nn.Parameter(torch.zeros(kinds, slots))
        self.gain = nn.Linear(task, kinds)
        # log2 channel weights. Not trained: measured on the base model once, or even.
        for number, direction in enumerate(self.directions):
            self.register_buffer(f"weight_{number}", torch.zeros(layers, direction.shape[1]))
        # log2 of the spread of (w - mean) relative to a random direction of that norm. Tables, not network outputs:
        # the entropy coder rounds them to integers that are equal on every machine.
        self.spread = nn.Parameter(torch.zeros(kinds, 2, layers, slots))

    @property
    def sensitivity(self) -> Sensitivity:
        """The weights that tokens are made with."""
        weights = [self.get_buffer(f"weight_{number}") for number in range(2 * len(self.config.kinds))]
        return Sensitivity(tuple(weights[INPUTS::2]), tuple(weights[OUTPUTS::2]))

    @sensitivity.setter
    def sensitivity(self, value: Sensitivity) -> None:
        """Set the weights, and the spreads of an untrained network: those of values that are equal in all channels."""
        for kind, pair in enumerate(zip(value.inputs, value.outputs, strict=True)):
            for side, weights in enumerate(pair):
                self.get_buffer(f"weight_{2 * kind + side}").copy_(weights)
                mean_square = torch.exp2(2 * value.profile(kind, side)).mean(dim=1)  # (L,)
                self.spread.data[kind, side] = -0.5 * mean_square.log2()[:, None]

    def embed(self, vectors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the condition in integer units, not rounded yet, shape (C,); `vectors` maps views to (hidden,)."""
        raw: torch.Tensor = self.condition(vectors)
        return raw

    def latent_prior(self, condition: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return mean and scale of z in integer units, each of shape (Z,)."""
        mean, log_scale = self.prior(condition / _GRID).chunk(2, dim=-1)
        return _BYTE * torch.tanh(mean / 8), torch.exp(log_scale.clamp(-3, 6)) + 0.3

    def posterior(self, tokens: Sequence[KindTokens], condition: torch.Tensor) -> torch.Tensor:
        """Return the mean of q(z|w,c) in integer units, shape (Z,)."""
        if not tokens:  # an adapter without energy has no slots to average
            return torch.zeros_like(self.encoder.leave.bias)
        place = self._embedded([Places(group.kind, group.layer, group.slot) for group in tokens], INPUTS)
        features = torch.cat([place, (condition / _GRID).expand(len(place), -1)], dim=1)
        mean: torch.Tensor = self.encoder(tokens, features)
        return mean

    def decode(self, places: Sequence[Places], state: TaskState) -> Prediction:
        """Predict the mean directions of tokens, of kinds that have the same widths, one kind after the other."""
        task = torch.cat([state.condition, state.latent]) / _GRID  # (C + Z,)
        counts, means = [len(part.layer) for part in places], []
        for side in (INPUTS, OUTPUTS):
            token = self._embedded(places, side)
            hidden = self.enter(torch.cat([token, task.expand(len(token), -1)], dim=1))  # (n, H)
            # The task also scales the features of places, as in FiLM (Perez et al., arXiv 1709.07871).
            hidden = (hidden + self.mix(silu(hidden))) * (1 + self.modulate(task))
            hidden = hidden + self.leave(silu(hidden))
            parts = zip(places, hidden.split(counts), strict=True)
            means.append(joined([rows @ self.directions[2 * part.kind + side] for part, rows in parts]))  # (n, size)
        return Prediction(*means)

    def gains(self, state: TaskState) -> torch.Tensor:
        """Predict how far the task's norms of each kind are above the table, in octaves, shape (K,)."""
        gains: torch.Tensor = self.gain(torch.cat([state.condition, state.latent]) / _GRID)
        return gains

    def _embedded(self, places: Sequence[Places], side: int) -> torch.Tensor:
        """Return the embeddings of places on one side, shape (n, 3E)."""
        layer, slot = (joined(list(column)) for column in list(zip(*places, strict=True))[1:])
        factors = torch.cat([layer.new_full((len(part.layer),), 2 * part.kind + side) for part in places])
        return torch.cat([self.layer(layer), self.slot(slot), self.factor(factors)], dim=1)


class ConditionNet(nn.Module):
    """Embed task vectors as a condition of C integers; either view may be missing, or both."""

    shift: torch.Tensor
    log_scale: torch.Tensor

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__()
        size, inner = config.condition_size, config.embedding
        # Hidden states share a large common part, so they are standardised over the fleet before anything reads them.
        # A generator without vectors has neither these buffers nor layers that read a view.
        if size:
            self.register_buffer("shift", torch.zeros(len(VIEWS), size))
            self.register_buffer("log_scale", torch.zeros(len(VIEWS), size))
        self.views = nn.ModuleList([nn.Linear(size, inner) for _ in VIEWS] if size else [])
        self.missing = nn.Parameter(torch.zeros(len(VIEWS), inner))
        self.out = nn.Linear(inner, config.condition)

    def standardise(self, mean: torch.Tensor, scale: torch.Tensor) -> None:
        """Set mean and scale that vectors are standardised by, (views, hidden) each, rounded as they are stored."""
        self.log_scale.copy_((scale.log2() * OCTAVE).round() / OCTAVE)
        self.shift.copy_((mean * torch.exp2(-self.log_scale) * OCTAVE).round() / OCTAVE)

    def forward(self, vectors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Embed the views that are there; returns shape (C,), values in [-127, 127]."""
        hidden = torch.zeros_like(self.missing[0])
        for number, view in enumerate(VIEWS):
            if view in vectors and len(self.views):
                standard = vectors[view] * torch.exp2(-self.log_scale[number]) - self.shift[number]
                hidden = hidden + self.views[number](standard / standard.numel() ** 0.5)  # (E,)
            else:
                hidden = hidden + self.missing[number]
        return _BYTE * torch.tanh(self.out(silu(hidden)))


class TokenEncoder(nn.Module):
    """q(z|w,c): a bilinear sketch of every rank slot, an MLP, and a mean over slots weighted by energy."""

    # The sketch (P v) * (Q u) stays the same when both vectors change sign, which singular vectors may do.

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__()
        inner = 2 * config.embedding
        pairs = [(kind.inputs, kind.outputs) for kind in config.kinds]
        self.sketch_in = nn.ParameterList([torch.randn(size, config.sketch) for size, _ in pairs])
        self.sketch_out = nn.ParameterList([torch.randn(size, config.sketch) for _, size in pairs])
        self.enter = nn.Linear(config.sketch + 1 + 3 * config.embedding + config.condition, inner)
        self.leave = nn.Linear(inner, config.latent)

    def forward(self, tokens: Sequence[KindTokens], features: torch.Tensor) -> torch.Tensor:
        """Return the posterior mean, shape (Z,), in [-127, 127]; features are of all tokens in turn, (n, 3E + C)."""
        norm = joined([group.norm for group in tokens])[:, None]
        right = joined([group.inputs @ self.sketch_in[group.kind] for group in tokens]) / norm  # (n, sketch)
        left = joined([group.outputs @ self.sketch_out[group.kind] for group in tokens]) / norm  # (n, sketch)
        hidden = silu(self.enter(torch.cat([right * left, norm.log2(), features], dim=1)))  # (n, 2E)
        energy, tiny = norm.square(), torch.finfo(norm.dtype).tiny
        return _BYTE * torch.tanh((energy * self.leave(hidden)).sum(0) / energy.sum().clamp_min(tiny) / 8)


def joined(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Concatenate rows; of one part there is no copy."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def predicted_tokens(net: CVAE, state: TaskState, modules: Sequence[tuple[int, int, int]]) -> list[KindTokens]:
    """Predict tokens from the task alone, for modules given as sorted (kind, layer, rank)."""
    gains = net.gains(state)
    groups = []
    for kind in sorted({kind for kind, _, _ in modules}):
        rows = [(layer, slot) for k, layer, rank in modules if k == kind for slot in range(rank)]
        layer, slot = torch.tensor(rows).T
        norm = torch.exp2(net.norm_mean[kind, layer, slot] + gains[kind])
        mean = net.decode([Places(kind, layer, slot)], state)
        groups.append(_resized(KindTokens(kind, layer, slot, norm, mean.inputs, mean.outputs)))
    return groups


def _resized(group: KindTokens) -> KindTokens:
    """Scale predicted directions to tokens whose dW is between the least-squares and the expected size."""
    # The mean direction of uncertain tokens is shorter than 1, and dW shrinks with its square. That is best in the
    # least-squares sense, but a working adapter needs more. So the size is raised half way, in logarithms, to the size
    # that is predicted for dW.
    confidence = group.inputs.norm(dim=1) * group.outputs.norm(dim=1)  # (n,)
    predicted = (group.norm * confidence).square().sum().sqrt()
    expected = group.norm.square().sum().sqrt()
    factor = (expected / predicted.clamp_min(1e-12)).sqrt().clamp(max=1e3) if predicted > 0 else predicted
    root = group.norm[:, None] * factor.sqrt()
    return KindTokens(group.kind, group.layer, group.slot, group.norm, root * group.inputs, root * group.outputs)
