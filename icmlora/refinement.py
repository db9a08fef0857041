"""Functional refinement: move a code to where it does what the adapter does, not to where its weights are nearest.

    texts ──base + adapter──▶ p(next token) ─┐
      └────base + code──────▶ q(next token) ─┴─ KL(p || q) and bits ──gradient──▶ values and strengths of the code

    minimise   KL(p || q) / KL(p || base)   +   price * error * bits / bits at the start

The base model is frozen. What coarse rounding loses of an adapter's function comes back this way, at fewer bits: the
second term makes values round to zero where that does no harm. Both terms are free of scale, so one price serves weak
and strong adapters of any size; it falls with the error of the code at the start, because what a bit buys does.
Decoding is as before and needs no base model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from icmlora.adapter import Adapter
from icmlora.base_model import BaseModel
from icmlora.errors import DataError
from icmlora.generator.relaxed import RelaxedCode
from icmlora.teacher import Teacher

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
    relaxed: RelaxedCode, error: float, base: BaseModel, adapter: Adapter, texts: Sequence[str], config: RefineConfig
) -> Iterator[int]:
    """Refine the code of one adapter; the caller may stop after any step and take the code as it is then.

    Args:
        relaxed: The code; changed in place.
        error: Its relative error, weighted by sensitivity.
        base: The adapter's base model; it is left as it was.
        adapter: The adapter.
        texts: Of the adapter's task, such as its samples.
        config: The options.

    Yields:
        The number of steps done, after each.

    Raises:
        DataError: No text has two tokens.
    """
    ids = [base.tokenizer(text, truncation=True, max_length=config.tokens)["input_ids"] for text in texts]
    ids = [row for row in ids if len(row) > 1]
    if not ids:
        raise DataError("there is no text to refine on", hint="give the task a samples.jsonl")
    if not relaxed.values:  # an adapter of zeros has a code without integers
        return
    groups = [
        {"params": relaxed.values, "lr": config.learning_rate},
        {"params": relaxed.strengths, "lr": config.strength_rate},
    ]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: (1 - done / config.steps) ** 0.5)
    teacher = Teacher(base, {module.name: (module.a, module.b) for module in adapter.modules}, ids)
    batches = _batches(len(ids), config)
    with torch.no_grad():
        effects = [float(teacher.divergence({}, [number])) for number in range(min(_EFFECT_TEXTS, len(ids)))]
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
