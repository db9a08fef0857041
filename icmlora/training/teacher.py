"""An adapter's predictions on some examples, stored compactly: the likeliest tokens of each distribution.

    example ──base + adapter──▶ log p (T, V) ──K likeliest, and the rest as one──▶ target (T, K), (T, K + 1)
                                                                                     │
    base + code ──▶ logits (T, V) ──log q of the same K + 1──▶ KL(p || q) ◀──────────┘
                         └──────loss──▶ how much larger it is than the adapter's

The rest of a vocabulary shares a few per cent of the probability; as a single event it still pulls as a whole. A target
takes a hundredth of the memory of its logits, so each example goes through the adapted model only once, however often
it is used. The divergence of the coarser distributions is a lower bound of the full divergence.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import torch

from icmlora.base_models.log_probabilities import log_probabilities
from icmlora.base_models.modality import IGNORED, BaseModel
from icmlora.base_models.running.lora_hooks import Factors, added, added_by_rows
from icmlora.io.devices import texts_at_once, uploaded

_T = TypeVar("_T")
KEPT = 128  # tokens stored per distribution
# Texts per pass on a CPU: short ones then take half of the time.
READ_TOGETHER = 4
# Limit of a model's parameters times the texts in one pass with gradients on a CPU: with 1.5 G parameters a text of 96
# tokens takes a fifth of a gigabyte, and reading it with others saves a fifth of the time.
_WITH_GRADIENTS = 2**32
_MIN_PROBABILITY = 1e-6  # of the rest; keeps its logarithm finite


@dataclass(frozen=True, eq=False)
class Target:
    """The distributions that an adapter predicts for one example, such as one after each of T tokens."""

    item: Any  # as the base model reads it
    tokens: torch.Tensor  # int64, shape (T, K): the likeliest next tokens
    wanted: torch.Tensor | None  # int64, shape (T,): the example's own; None where its loss takes more than predictions
    counts: torch.Tensor | None  # bool, shape (T,): whether it answers a prompt; None where there is no prompt
    count: int  # number of predictions that count
    log_p: torch.Tensor  # float32, shape (T, K + 1): log probabilities of the tokens, and of all others together
    loss: torch.Tensor  # of the example, summed: a scalar; 0 where it does not follow from the predictions

    def read(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return `log_p` and `loss` of another model's logits (T, V), with gradients if these have them."""
        return _read(logits, self.tokens, self.wanted)


@dataclass(frozen=True, eq=False)
class Shortfall:
    """How far other factors fall short of an adapter on some examples; with gradients."""

    # Where an example has a prompt, only the predictions of its answer count.
    divergence: torch.Tensor  # KL(original || other) in nats, averaged over the predictions
    of_each: torch.Tensor  # the same for each example, shape (examples,)
    fewest: int  # predictions that count in an example, at the minimum
    loss: torch.Tensor  # increase of the examples' loss, averaged over the predictions; negative if smaller
    of_prompts: torch.Tensor  # the divergence averaged over the predictions within prompts, 0 if there are none
    # Drop in the probability of each example's own answer, (examples,), without gradients; 0 without an answer.
    less_right: torch.Tensor


class Teacher:
    """The original adapter's predictions, computed in batches on first use."""

    def __init__(self, base: BaseModel, original: Factors, items: Sequence[Any]) -> None:
        self.base, self.original, self._items = base, original, items
        self._targets: dict[int, Target] = {}

    def __len__(self) -> int:
        return len(self._items)

    @property
    def has_prompts(self) -> bool:
        """Whether some of the examples are prompts with answers."""
        return self.answer_size > 0

    @cached_property
    def answer_size(self) -> float:
        """Mean number of predictions of an answer's tokens over the examples that have one; else 0."""
        answers = (self.base.modality.answers(item) for item in self._items)
        sizes = [sum(answer) for answer in answers if answer is not None]
        return sum(sizes) / max(len(sizes), 1)

    @property
    def size(self) -> float:
        """Mean size of an example, in the unit of limits."""
        return sum(int(item.size) for item in self._items) / len(self)

    @torch.no_grad()
    def targets(self, numbers: Sequence[int]) -> list[Target]:
        """Return the adapter's predictions for some examples."""
        missing = [number for number in dict.fromkeys(numbers) if number not in self._targets]
        for some in _batches(missing, _at_once(self.base)):
            items = [self._items[number] for number in some]
            with added(self.base.model, self.original):
                rows = self.base.modality.logits(self.base, items)  # (T, V) each
            for number, item, logits in zip(some, items, rows, strict=True):
                self._targets[number] = target(self.base, item, logits)
            del rows, logits  # they take much memory, and the next pass makes others
        return [self._targets[number] for number in numbers]


def target(base: BaseModel, item: Any, logits: torch.Tensor, counts: torch.Tensor | None = None) -> Target:
    """Reduce an item's logits (T, V) to a target; counts is (T,), by default the item's answer, if it has one."""
    if counts is None and (answers := base.modality.answers(item)) is not None:
        counts = uploaded(answers, logits.device).bool()
    tokens = logits.topk(min(KEPT, logits.shape[-1] - 1), dim=-1).indices
    wanted, own = None, base.modality.wanted(item)
    if own is not None:
        wanted = uploaded([*[IGNORED] * (len(logits) - len(own)), *own], logits.device)
        wanted = wanted if counts is None else wanted.masked_fill(~counts, IGNORED)
    count = len(logits) if counts is None else int(counts.sum())
    return Target(item, tokens, wanted, counts, count, *_read(logits, tokens, wanted))


def shortfalls(base: BaseModel, asked: Sequence[tuple[Teacher, Factors, Sequence[int]]]) -> list[Shortfall]:
    """Compare factors of several tasks with their originals, in one pass through the base model.

    `asked` has the teacher, factors and examples of each task, with equally many examples. The factors, A (r, in) and
    B (out, r), may require gradients; empty ones mean the bare base model.

    Raises:
        BaseModelUnsuited: The factors are for modules that do not compute row by row; never for a single task.
    """
    targets = [teacher.targets(numbers) for teacher, _, numbers in asked]
    every = [target for of_task in targets for target in of_task]
    several = [factors for _, factors, _ in asked]
    single = len(several) == 1
    reads = []
    with added(base.model, several[0]) if single else added_by_rows(base.model, several, len(every)):
        # One task's texts need not share a pass: batches that suit the device waste no time on padding.
        for some in _batches(every, _at_once(base) if single else len(every)):
            rows = base.modality.logits(base, [target.item for target in some])  # (T, V) each
            reads += [target.read(logits) for target, logits in zip(some, rows, strict=True)]
            del rows
    following = iter(reads)
    return [_shortfall(of_task, [next(following) for _ in of_task]) for of_task in targets]


def _shortfall(targets: Sequence[Target], reads: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> Shortfall:
    counts = [target.count for target in targets]
    nats, of_prompts, losses, less_right = [], [], [], []
    for target, (log_p, loss) in zip(targets, reads, strict=True):
        of_each = (target.log_p.exp() * (target.log_p - log_p)).sum(dim=-1)  # KL(target || other)
        losses.append(loss - target.loss)
        if target.counts is None:
            nats.append(of_each.sum())
            of_prompts.append(of_each.new_zeros(()))
            less_right.append(target.loss.new_zeros(()))
        else:
            nats.append(torch.where(target.counts, of_each, 0.0).sum())
            of_prompts.append(torch.where(target.counts, 0.0, of_each).sum())
            less_right.append((-target.loss).exp() - (-loss.detach()).exp())
    within = sum(len(log_p) for log_p, _ in reads) - sum(counts)
    return Shortfall(
        divergence=torch.stack(nats).sum() / sum(counts),
        of_each=torch.stack([one / count for one, count in zip(nats, counts, strict=True)]),
        fewest=min(counts),
        loss=torch.stack(losses).sum() / sum(counts),
        of_prompts=torch.stack(of_prompts).sum() / max(within, 1),
        less_right=torch.stack(less_right),
    )


def texts_with_gradients(base: BaseModel) -> int:
    """Return how many texts go through a base model together with gradients."""
    if base.device.type != "cpu":
        return _at_once(base)
    parameters = sum(int(parameter.numel()) for parameter in base.model.parameters())
    return min(max(_WITH_GRADIENTS // max(parameters, 1), 1), READ_TOGETHER)


def _at_once(base: BaseModel) -> int:
    """Return how many texts go through a base model together."""
    return max(READ_TOGETHER, texts_at_once(base.device))


def _batches(items: Sequence[_T], size: int) -> Iterator[Sequence[_T]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def _read(logits: torch.Tensor, tokens: torch.Tensor, wanted: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `Target.log_p` and `Target.loss` of logits (T, V), reading them once; tokens are (T, K), wanted (T,)."""
    chosen = tokens if wanted is None else torch.cat([tokens, wanted.clamp_min(0)[:, None]], dim=-1)
    log_p = log_probabilities(logits, chosen)
    listed = log_p[:, : tokens.shape[1]]
    rest = (1 - listed.exp().sum(dim=-1, keepdim=True)).clamp_min(_MIN_PROBABILITY)
    loss = log_p.new_zeros(()) if wanted is None else -torch.where(wanted == IGNORED, 0.0, log_p[:, -1]).sum()
    return torch.cat([listed, rest.log()], dim=-1), loss
