"""What an adapter predicts on some texts, kept small: of each next-token distribution its likeliest tokens.

    text ──base + adapter──▶ log p (T, V) ──K likeliest, and the rest as one──▶ Wanted (T, K), (T, K + 1)
                                                                                   │
    base + code ──▶ logits (rows, T, V) ──log q of the same K + 1──▶ KL(p || q) ◀──┘

The rest of a vocabulary shares a few per cent of the probability; as one event it still pulls as a whole, and what is
kept of a text takes a hundredth of its logits. So each text goes through the adapted model once, however often it is
used. The divergence of the coarser distributions is at most that of the full ones.

Functional refinement: move a code to where it does what the adapter does, not to where its weights are nearest.

    texts ──base + adapter──▶ p(next token) ─┐
      └────base + code──────▶ q(next token) ─┴─ KL(p || q) and bits ──gradient──▶ values and strengths of the code

    minimise   KL(p || q) / KL(p || base)   +   price * error * bits / bits at the start

The base model is frozen. What coarse rounding loses of an adapter's function comes back this way, at fewer bits: the
second term makes values round to zero where that does no harm. Both terms are free of scale, so one price serves weak
and strong adapters of any size; it falls with the error of the code at the start, because what a bit buys does.
Decoding is as before and needs no base model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from icmlora.adapter.model import Adapter
from icmlora.base_models.modality import BaseModel
from icmlora.errors import DataError
from icmlora.generator.relaxed import Factors, RelaxedCode

KEPT = 128
"""Tokens kept of each distribution."""
_LEAST = 1e-6
"""Smallest probability of the rest, so that its logarithm is finite."""


@dataclass(frozen=True, eq=False)
class Wanted:
    """The distributions that an adapter predicts for one example, such as one after each of T tokens."""

    item: Any
    """The example, as the base model reads it."""
    tokens: torch.Tensor
    """int64, shape (T, K): the likeliest next tokens."""
    log_p: torch.Tensor
    """float32, shape (T, K + 1): their log probabilities, and that of all others together."""


class Teacher:
    """The original's predictions, made when a text is first asked for.

    Args:
        base: The adapter's base model.
        original: Its factors.
        items: Examples as the base model reads them, from its modality's `prepare`.
    """

    def __init__(self, base: BaseModel, original: Factors, items: Sequence[Any]) -> None:
        self._base, self._original, self._items = base, original, items
        self._known: dict[int, Wanted] = {}

    def __len__(self) -> int:
        return len(self._items)

    def divergence(self, code: Factors, numbers: Sequence[int]) -> torch.Tensor:
        """Return KL(original || code) of the next token in nats, averaged over the tokens of some texts.

        Args:
            code: Factors of the other adapter, with or without gradients; none are the base model.
            numbers: Which texts.
        """
        wanted = [self._wanted(number) for number in numbers]
        with added(self._base.model, code):
            rows = self._base.modality.logits(self._base, [one.item for one in wanted])  # (T, V) each
        nats = torch.stack([_nats(one, row) for one, row in zip(wanted, rows, strict=True)])
        return nats.sum() / torch.tensor(sum(len(row) for row in rows), device=nats.device)

    @torch.no_grad()
    def _wanted(self, number: int) -> Wanted:
        if number not in self._known:
            item = self._items[number]
            with added(self._base.model, self._original):
                (logits,) = self._base.modality.logits(self._base, [item])  # (T, V)
            tokens = logits.topk(min(KEPT, logits.shape[-1] - 1), dim=-1).indices
            self._known[number] = Wanted(item, tokens, _log_shares(logits, tokens))
        return self._known[number]


def _log_shares(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Return log probabilities of chosen tokens and of all others together, shape (T, K + 1)."""
    whole = logits.float()
    chosen = whole.gather(-1, tokens) - whole.logsumexp(dim=-1, keepdim=True)
    rest = (1 - chosen.exp().sum(dim=-1, keepdim=True)).clamp_min(_LEAST)
    return torch.cat([chosen, rest.log()], dim=-1)


def _nats(wanted: Wanted, logits: torch.Tensor) -> torch.Tensor:
    """Return KL(wanted || logits) in nats, summed over one text."""
    return (wanted.log_p.exp() * (wanted.log_p - _log_shares(logits, wanted.tokens))).sum()


@contextmanager
def added(model: nn.Module, factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> Iterator[None]:
    """Add dW = B A to linear modules for the block, with gradients to the factors.

    Args:
        model: The base model.
        factors: By dotted module name: A (r, in) and B (out, r), moved to where the module is.
    """

    def adder(a: torch.Tensor, b: torch.Tensor) -> object:
        def hook(_: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
            x = inputs[0]
            return output + (x @ a.to(x).T) @ b.to(x).T

        return hook

    handles = [model.get_submodule(name).register_forward_hook(adder(a, b)) for name, (a, b) in factors.items()]  # type: ignore[arg-type]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


_EFFECT_TEXTS = 8
_LEAST_EFFECT = 1e-6
"""Nats per token; an adapter that does less does nothing."""


@dataclass(frozen=True)
class RefineConfig:
    """How a code is refined."""

    steps: int = 40
    """Optimiser steps."""
    learning_rate: float = 0.03
    """Adam's, in quantiser steps."""
    strength_rate: float = 0.03
    """Adam's, in octaves."""
    price: float = 0.125
    """What the bits of the whole code are worth: this times its error, of the adapter's whole effect."""
    texts: int = 2
    """Texts of each step."""
    tokens: int = 192
    """Tokens read of a text."""
    seed: int = 0


def refine(
    relaxed: RelaxedCode, error: float, base: BaseModel, adapter: Adapter, samples: Sequence[Any], config: RefineConfig
) -> Iterator[int]:
    """Refine the code of one adapter; the caller may stop after any step and take the code as it is then.

    Args:
        relaxed: The code; changed in place.
        error: Its relative error, weighted by sensitivity.
        base: The adapter's base model; it is left as it was.
        adapter: The adapter.
        samples: Of the adapter's task, as the base model's modality reads them.
        config: The options.

    Yields:
        The number of steps done, after each.

    Raises:
        DataError: No text has two tokens.
    """
    if not samples:
        raise DataError("there is nothing to refine on", hint="give the task a samples.jsonl")
    items = base.modality.prepare(base, samples, config.tokens, whole=True)
    if not relaxed.values:  # an adapter of zeros has a code without integers
        return
    groups = [
        {"params": relaxed.values, "lr": config.learning_rate},
        {"params": relaxed.strengths, "lr": config.strength_rate},
    ]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: (1 - done / config.steps) ** 0.5)
    teacher = Teacher(base, {module.name: (module.a, module.b) for module in adapter.modules}, items)
    batches = _batches(len(items), config)
    with torch.no_grad():
        effects = [float(teacher.divergence({}, [number])) for number in range(min(_EFFECT_TEXTS, len(items)))]
        effect = max(sum(effects) / len(effects), _LEAST_EFFECT)
        price = config.price * error / max(float(relaxed.bits()), 1.0)
    for step in range(config.steps):
        optimizer.zero_grad()
        divergence = teacher.divergence(relaxed.factors(), next(batches))
        (divergence / effect + price * relaxed.bits()).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        decay.step()
        yield step + 1


def _batches(texts: int, config: RefineConfig) -> Iterator[list[int]]:
    """Yield the numbers of each step's texts; every text is drawn once before any is drawn again."""
    draw = torch.Generator().manual_seed(config.seed)
    waiting: list[int] = []
    while True:
        while len(waiting) < config.texts:
            waiting += torch.randperm(texts, generator=draw).tolist()
        batch, waiting = waiting[: config.texts], waiting[config.texts :]
        yield batch
