"""The conditional variational autoencoder over adapter tokens, after ICM-LoRA (arXiv 2501.17635).

The paper's CVAE flattens one adapter into one vector. Here it is token-wise, so one network serves mixed ranks and
module kinds. It is built as a mean-and-scale hyperprior (Minnen et al., arXiv 1809.02736), so its loss is the length of
the stored code in bits:

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

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import silu

from icmlora.generator.config import GeneratorConfig
from icmlora.generator.initial_a.subspace import InitialSubspace
from icmlora.generator.network.stack import INPUTS, OUTPUTS, Places, Stack, places_of
from icmlora.generator.network.tokens import KindTokens
from icmlora.generator.scales import OCTAVE
from icmlora.generator.sensitivity import Sensitivity

VIEWS = ("adapted", "context")

# Condition and latent are one-byte integers; the network sees them divided by this, so a byte covers about +-8.
_GRID = 16.0
_BYTE = 127.0


@dataclass(frozen=True, eq=False)
class TaskState:
    """The decoder's input for a task: two vectors of integers in [-127, 127], and where its training began."""

    condition: torch.Tensor  # shape (C,)
    latent: torch.Tensor  # shape (Z,)
    subspace: InitialSubspace  # directions of its inputs that cost nothing to store

    @property
    def features(self) -> torch.Tensor:
        """The network's input, shape (C + Z,)."""
        return features_of(self.condition, self.latent)


def features_of(condition: torch.Tensor, latent: torch.Tensor) -> torch.Tensor:
    """Return the network's input for tasks, shape (..., C + Z), from integer units: (..., C) and (..., Z)."""
    return torch.cat([condition, latent], dim=-1) / _GRID


class CVAE(nn.Module):
    """TokenEncoder, prior and decoder of one fleet (diagram above). All sizes come from `GeneratorConfig`."""

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
        """The channel weights of tokens."""
        weights = [self.get_buffer(f"weight_{number}") for number in range(2 * len(self.config.kinds))]
        return Sensitivity(tuple(weights[INPUTS::2]), tuple(weights[OUTPUTS::2]))

    @sensitivity.setter
    def sensitivity(self, value: Sensitivity) -> None:
        """Set the weights, and the spreads of an untrained network for values that are equal in all channels."""
        for kind, pair in enumerate(zip(value.inputs, value.outputs, strict=True)):
            for side, weights in enumerate(pair):
                self.get_buffer(f"weight_{2 * kind + side}").copy_(weights)
                mean_square = torch.exp2(2 * value.profile(kind, side)).mean(dim=1)  # (L,)
                self.spread.data[kind, side] = -0.5 * mean_square.log2()[:, None]

    def latent_prior(self, condition: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return mean and scale of z in integer units, each of shape (..., Z)."""
        mean, log_scale = self.prior(condition / _GRID).chunk(2, dim=-1)
        return _BYTE * torch.tanh(mean / 8), torch.exp(log_scale.clamp(-3, 6)) + 0.3

    def posterior(self, stack: Stack, condition: torch.Tensor) -> torch.Tensor:
        """Return the mean of q(z|w,c) of each adapter in integer units, shape (B, Z); condition: (B, C)."""
        if not stack.values:  # adapters without energy have no slots to average
            return condition.new_zeros(stack.adapters, self.config.latent)
        place = self._embedded(stack.places, INPUTS)
        features = torch.cat([place, (condition / _GRID).index_select(0, stack.places.owner)], dim=1)
        mean: torch.Tensor = self.encoder(stack, features)
        return mean

    def decode(self, places: Places, features: torch.Tensor) -> list[tuple[torch.Tensor, ...]]:
        """Predict the directions of inputs and outputs, kind by kind: the mean tokens divided by their norms.

        Features are of their task (C + Z,), or tasks (B, C + Z).
        """
        sides = []
        for side, hidden in enumerate(self.hidden(places, features)):
            parts = zip(places.counts, torch.split(hidden, [count for _, count in places.counts]), strict=True)
            sides.append([rows @ self.directions[2 * kind + side] for (kind, _), rows in parts])
        return list(zip(*sides, strict=True))

    def hidden(self, places: Places, features: torch.Tensor) -> Iterator[torch.Tensor]:
        """Yield the hidden features of inputs and of outputs, both of shape (n, H); see `decode`."""
        task, scale = features, 1 + self.modulate(features)
        if features.dim() > 1:
            task, scale = task.index_select(0, places.owner), scale.index_select(0, places.owner)
        for side in (INPUTS, OUTPUTS):
            token = self._embedded(places, side)
            hidden = self.enter(torch.cat([token, task.expand(len(token), -1)], dim=1))  # (n, H)
            # The task also scales the features of places, as in FiLM (Perez et al., arXiv 1709.07871).
            hidden = (hidden + self.mix(silu(hidden))) * scale
            yield hidden + self.leave(silu(hidden))

    def _embedded(self, places: Places, side: int) -> torch.Tensor:
        """Return the embeddings of places on one side, shape (n, 3E)."""
        factor = self.factor(2 * places.kind + side)
        return torch.cat([self.layer(places.layer), self.slot(places.slot), factor], dim=1)


class ConditionNet(nn.Module):
    """Embeds task vectors as a condition of C integers; either or both views may be missing."""

    shift: torch.Tensor
    log_scale: torch.Tensor

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__()
        size, inner = config.condition_size, config.embedding
        # Hidden states share a large common part, so they are standardised over the fleet before anything reads them.
        # A generator without vectors has neither these buffers nor layers for views.
        if size:
            self.register_buffer("shift", torch.zeros(len(VIEWS), size))
            self.register_buffer("log_scale", torch.zeros(len(VIEWS), size))
        self.views = nn.ModuleList([nn.Linear(size, inner) for _ in VIEWS] if size else [])
        self.missing = nn.Parameter(torch.zeros(len(VIEWS), inner))
        self.out = nn.Linear(inner, config.condition)

    def standardise(self, mean: torch.Tensor, scale: torch.Tensor) -> None:
        """Set the mean and scale for standardising vectors, (views, hidden) each, rounded as stored."""
        self.log_scale.copy_((scale.log2() * OCTAVE).round() / OCTAVE)
        self.shift.copy_((mean * torch.exp2(-self.log_scale) * OCTAVE).round() / OCTAVE)

    def forward(
        self, vectors: Mapping[str, torch.Tensor], present: Mapping[str, torch.Tensor] | None = None
    ) -> torch.Tensor:
        """Return the condition in integer units, not rounded yet, shape (C,), values in [-127, 127].

        `vectors` maps the available views to (hidden,). For B tasks, views have the shape (B, hidden), and `present`,
        (B, 1), marks the tasks with a view where some lack it; the result has the shape (B, C).
        """
        hidden = torch.zeros_like(self.missing[0])
        for number, view in enumerate(VIEWS):
            seen = self.missing[number]
            if view in vectors and len(self.views):
                standard = vectors[view] * torch.exp2(-self.log_scale[number]) - self.shift[number]
                seen = self.views[number](standard / standard.shape[-1] ** 0.5)  # (..., E)
                if present and view in present:
                    seen = torch.where(present[view], seen, self.missing[number])
            hidden = hidden + seen
        return _BYTE * torch.tanh(self.out(silu(hidden)))


class TokenEncoder(nn.Module):
    """q(z|w,c): a bilinear sketch of every rank slot, an MLP, and a mean over slots weighted by energy."""

    # The sketch (P v) * (Q u) does not change when both vectors flip sign, as singular vectors may.

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__()
        inner = 2 * config.embedding
        pairs = [(kind.inputs, kind.outputs) for kind in config.kinds]
        self.sketch_in = nn.ParameterList([torch.randn(size, config.sketch) for size, _ in pairs])
        self.sketch_out = nn.ParameterList([torch.randn(size, config.sketch) for _, size in pairs])
        self.enter = nn.Linear(config.sketch + 1 + 3 * config.embedding + config.condition, inner)
        self.leave = nn.Linear(inner, config.latent)

    def forward(self, stack: Stack, features: torch.Tensor) -> torch.Tensor:
        """Return the posterior means, shape (B, Z), in [-127, 127]; features are of all tokens, (n, 3E + C)."""
        kinds = [kind for kind, _ in stack.places.counts]
        sides = [zip(kinds, stack.by_kind(side), strict=True) for side in (INPUTS, OUTPUTS)]
        right = torch.cat([values @ self.sketch_in[kind] for kind, values in sides[INPUTS]])  # (n, sketch)
        left = torch.cat([values @ self.sketch_out[kind] for kind, values in sides[OUTPUTS]])  # (n, sketch)
        norm = stack.norm[:, None]
        sketch = (right / norm) * (left / norm)
        hidden = silu(self.enter(torch.cat([sketch, stack.log_norm[:, None], features], dim=1)))  # (n, 2E)
        mean = stack.summed(stack.energy[:, None] * self.leave(hidden))
        return _BYTE * torch.tanh(mean / 8)


def predicted_tokens(net: CVAE, state: TaskState, modules: Sequence[tuple[int, int, int]]) -> list[KindTokens]:
    """Predict tokens from the task alone, for modules given as sorted (kind, layer, rank)."""
    gains = net.gain(state.features)
    groups = []
    for kind in sorted({kind for kind, _, _ in modules}):
        rows = [(layer, slot) for k, layer, rank in modules if k == kind for slot in range(rank)]
        layer, slot = torch.tensor(rows).T
        norm = torch.exp2(net.norm_mean[kind, layer, slot] + gains[kind])
        ((inputs, outputs),) = net.decode(places_of(kind, layer, slot), state.features)
        # The mean direction of uncertain tokens is shorter than 1, and dW shrinks with its square. That is best in the
        # least-squares sense, but a working adapter needs more. So the size is raised half way, in logarithms, to the
        # predicted size of dW.
        confidence = inputs.norm(dim=1) * outputs.norm(dim=1)  # (n,)
        predicted, expected = (norm * confidence).square().sum().sqrt(), norm.square().sum().sqrt()
        factor = (expected / predicted.clamp_min(1e-12)).sqrt().clamp(max=1e3) if predicted > 0 else predicted
        root = norm[:, None] * factor.sqrt()
        groups.append(KindTokens(kind, layer, slot, norm, root * inputs, root * outputs))
    return groups
