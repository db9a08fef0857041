"""What an adapter predicts on some examples, stored small: the likeliest tokens of each next-token distribution.

    example ──base + adapter──▶ log p (T, V) ──K likeliest, and the rest as one──▶ target (T, K), (T, K + 1)
                                                                                     │
    base + code ──▶ logits (T, V) ──log q of the same K + 1──▶ KL(p || q) ◀──────────┘

The rest of a vocabulary shares a few per cent of the probability; as a single event it still pulls as a whole. A target
takes a hundredth of the memory of its logits, so each example goes through the adapted model only once, however often
it is used. The divergence of the coarser distributions is at most that of the full ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from icmlora.base_models.factors import Factors, added
from icmlora.base_models.modality import BaseModel

KEPT = 128  # tokens stored of each distribution
_LEAST = 1e-6  # smallest probability of the rest, so that its logarithm is finite


@dataclass(frozen=True, eq=False)
class Target:
    """The distributions that an adapter predicts for one example, such as one after each of T tokens."""

    item: Any  # as the base model reads it
    tokens: torch.Tensor  # int64, shape (T, K): the likeliest next tokens
    log_p: torch.Tensor  # float32, shape (T, K + 1): their log probabilities, and that of all others together


class Teacher:
    """The original adapter's predictions, made when an example is first asked for."""

    def __init__(self, base: BaseModel, original: Factors, items: Sequence[Any]) -> None:
        self._base, self._original, self._items = base, original, items
        self._targets: dict[int, Target] = {}

    def __len__(self) -> int:
        return len(self._items)

    def divergence(self, other: Factors, numbers: Sequence[int]) -> torch.Tensor:
        """Return KL(original || other) of the next token in nats, averaged over the tokens of some examples."""
        # other: with or without gradients; empty for the bare base model.
        targets = [self._target(number) for number in numbers]
        with added(self._base.model, other):
            rows = self._base.modality.logits(self._base, [target.item for target in targets])  # (T, V) each
        nats = torch.stack([_nats(target, row) for target, row in zip(targets, rows, strict=True)])
        return nats.sum() / torch.tensor(sum(len(row) for row in rows), device=nats.device)

    @torch.no_grad()
    def _target(self, number: int) -> Target:
        if number not in self._targets:
            item = self._items[number]
            with added(self._base.model, self._original):
                (logits,) = self._base.modality.logits(self._base, [item])  # (T, V)
            tokens = logits.topk(min(KEPT, logits.shape[-1] - 1), dim=-1).indices
            self._targets[number] = Target(item, tokens, _log_shares(logits, tokens))
        return self._targets[number]


def _log_shares(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Return log probabilities of the chosen tokens and of all others together, shape (T, K + 1)."""
    whole = logits.float()
    chosen = whole.gather(-1, tokens) - whole.logsumexp(dim=-1, keepdim=True)
    rest = (1 - chosen.exp().sum(dim=-1, keepdim=True)).clamp_min(_LEAST)
    return torch.cat([chosen, rest.log()], dim=-1)


def _nats(target: Target, logits: torch.Tensor) -> torch.Tensor:
    """Return KL(target || logits) in nats, summed over one example."""
    return (target.log_p.exp() * (target.log_p - _log_shares(logits, target.tokens))).sum()
