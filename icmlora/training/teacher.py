"""What an adapter predicts on some examples, stored small: the likeliest tokens of each next-token distribution.

    example ──base + adapter──▶ log p (T, V) ──K likeliest, and the rest as one──▶ target (T, K), (T, K + 1)
                                                                                     │
    base + code ──▶ logits (T, V) ──log q of the same K + 1──▶ KL(p || q) ◀──────────┘
                         └──────loss──▶ how much larger it is than the adapter's

The rest of a vocabulary shares a few per cent of the probability; as a single event it still pulls as a whole. A target
takes a hundredth of the memory of its logits, so each example goes through the adapted model only once, however often
it is used. The divergence of the coarser distributions is at most that of the full ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from icmlora.base_models.modality import BaseModel
from icmlora.base_models.running.lora_hooks import Factors, added, added_by_rows
from icmlora.io.devices import texts_at_once

KEPT = 128  # tokens stored of each distribution
_LEAST = 1e-6  # smallest probability of the rest, so that its logarithm is finite


@dataclass(frozen=True, eq=False)
class Target:
    """The distributions that an adapter predicts for one example, such as one after each of T tokens."""

    item: Any  # as the base model reads it
    tokens: torch.Tensor  # int64, shape (T, K): the likeliest next tokens
    log_p: torch.Tensor  # float32, shape (T, K + 1): their log probabilities, and that of all others together
    loss: float | None  # of the example under the adapter, summed; None where it does not follow from the predictions


@dataclass(frozen=True, eq=False)
class Shortfall:
    """How far other factors are from doing what an adapter does on some examples; scalars with gradients."""

    divergence: torch.Tensor  # KL(original || other) in nats, averaged over the predictions
    loss: torch.Tensor  # by how much the examples' loss is larger, averaged over the predictions; 0 if it is smaller


class Teacher:
    """The original adapter's predictions, made when examples are first asked for, in batches."""

    def __init__(self, base: BaseModel, original: Factors, items: Sequence[Any]) -> None:
        self._base, self._original, self._items = base, original, items
        self._targets: dict[int, Target] = {}

    def __len__(self) -> int:
        return len(self._items)

    @torch.no_grad()
    def targets(self, numbers: Sequence[int]) -> list[Target]:
        """Return what the adapter predicts for some examples."""
        missing = [number for number in dict.fromkeys(numbers) if number not in self._targets]
        for some in _batches(missing, texts_at_once(self._base.device)):
            items = [self._items[number] for number in some]
            with added(self._base.model, self._original):
                rows = self._base.modality.logits(self._base, items)  # (T, V) each
            for number, item, logits in zip(some, items, rows, strict=True):
                tokens = logits.topk(min(KEPT, logits.shape[-1] - 1), dim=-1).indices
                loss = self._base.modality.item_loss(item, logits)
                shares = _log_shares(logits, tokens)
                self._targets[number] = Target(item, tokens, shares, None if loss is None else float(loss))
        return [self._targets[number] for number in numbers]

    @torch.no_grad()
    def effect(self, most: int) -> float:
        """Return KL(adapter || base) in nats: the mean over the predictions of an example, over `most` examples."""
        found = []
        for some in _batches(range(min(most, len(self))), texts_at_once(self._base.device)):
            targets = self.targets(some)
            rows = self._base.modality.logits(self._base, [target.item for target in targets])
            found += [_nats(target, row) / len(row) for target, row in zip(targets, rows, strict=True)]
        return float(torch.stack(found).mean())


def shortfalls(base: BaseModel, asked: Sequence[tuple[Teacher, Factors, Sequence[int]]]) -> list[Shortfall]:
    """Compare factors of several tasks with their originals, in one pass through the base model.

    Asked are teacher, factors and examples of each task, the same number of examples for each. The factors, A (r, in)
    and B (out, r), are with or without gradients; none stand for the bare base model.

    Raises:
        BaseModelUnsuited: The factors are for modules that do not compute row by row; for one task never.
    """
    targets = [teacher.targets(numbers) for teacher, _, numbers in asked]
    items = [target.item for of_task in targets for target in of_task]
    several = [factors for _, factors, _ in asked]
    single = len(several) == 1
    with added(base.model, several[0]) if single else added_by_rows(base.model, several, len(items)):
        rows = iter(base.modality.logits(base, items))  # (T, V) each
    return [_shortfall(base, [(target, next(rows)) for target in of_task]) for of_task in targets]


def _shortfall(base: BaseModel, pairs: Sequence[tuple[Target, torch.Tensor]]) -> Shortfall:
    count = sum(len(row) for _, row in pairs)
    nats = torch.stack([_nats(target, row) for target, row in pairs]).sum()
    losses = [
        found - target.loss
        for target, row in pairs
        if target.loss is not None and (found := base.modality.item_loss(target.item, row)) is not None
    ]
    more = torch.stack(losses).sum().clamp_min(0) if losses else torch.zeros_like(nats)
    return Shortfall(nats / count, more / count)


def _batches(numbers: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    return (numbers[start : start + size] for start in range(0, len(numbers), size))


def _log_shares(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Return log probabilities of the chosen tokens and of all others together, shape (T, K + 1)."""
    whole = logits.float()
    chosen = whole.gather(-1, tokens) - whole.logsumexp(dim=-1, keepdim=True)
    rest = (1 - chosen.exp().sum(dim=-1, keepdim=True)).clamp_min(_LEAST)
    return torch.cat([chosen, rest.log()], dim=-1)


def _nats(target: Target, logits: torch.Tensor) -> torch.Tensor:
    """Return KL(target || logits) in nats, summed over one example."""
    return (target.log_p.exp() * (target.log_p - _log_shares(logits, target.tokens))).sum()
