"""How well a model predicts the held-out text of a task, and what an adapter is worth.

    text -> tokens t0 t1 ... tn -> sum of -log p(t_i | t_0 .. t_i-1) over the scored tokens = nats
    retained gain = (L_base - L_x) / (L_base - L_original),  L in nats per token

Losses are sums over predicted tokens, so that texts of different length weigh by their length.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional
from transformers import PreTrainedTokenizerBase

from icmlora.errors import DataError
from icmlora.examples import Example
from icmlora.padding import padded


@dataclass(frozen=True)
class NllResult:
    """Negative log-likelihood of text under a model.

    Attributes:
        nats: Sum over the scored tokens.
        tokens: How many were scored.
        utf8_bytes: Length in UTF-8 of the text that those tokens spell; a character that a limit cuts counts as three.
    """

    nats: float
    tokens: int
    utf8_bytes: int

    @property
    def nats_per_token(self) -> float:
        """Mean negative log-likelihood."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """The exponential of the mean; infinity where it overflows."""
        return math.exp(self.nats_per_token) if self.nats_per_token < 700 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte of text, which compares models with different tokenizers."""
        return self.nats / math.log(2) / self.utf8_bytes


@dataclass(frozen=True)
class Scored:
    """Token ids of one example and the index of the first that is scored, at least 1."""

    ids: list[int]
    first: int

    @property
    def count(self) -> int:
        """How many tokens are scored."""
        return len(self.ids) - self.first


def nll(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    max_tokens: int = 256,
    batch_size: int = 1,
) -> NllResult:
    """Score examples by teacher forcing.

    Args:
        model: A causal language model, bare or adapted.
        tokenizer: Its tokenizer.
        examples: The texts; of one with a prompt only the completion is scored.
        max_tokens: Tokens of an example that are read. Of a prompt the last ones that fit are kept.
        batch_size: Examples per forward pass; more than 1 pays on accelerators only.

    Raises:
        DataError: No token of any example is left to predict.
    """
    scored = tokenized(tokenizer, examples, max_tokens)
    # Summed in input order, whatever the batches were.
    starts = range(0, len(scored), batch_size)
    nats = math.fsum(value for start in starts for value in _batch_nats(model, scored[start : start + batch_size]))
    spelled = (tokenizer.decode(s.ids[s.first :], clean_up_tokenization_spaces=False) for s in scored)
    return NllResult(
        nats=nats,
        tokens=sum(item.count for item in scored),
        utf8_bytes=max(1, sum(len(str(text).encode()) for text in spelled)),
    )


def retained_gain(base: float, original: float, other: float) -> float | None:
    """Return which share of the original adapter's gain another adapter keeps.

    1 is as good as the original, 0 as good as no adapter; both ends may be passed.

    Args:
        base: Nats per token of the base model.
        original: With the original adapter.
        other: With the adapter in question.

    Returns:
        The share, or None where the original does not help, so that there is no gain to keep.
    """
    gain = base - original
    return (base - other) / gain if gain > 0 else None


def tokenized(tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], limit: int) -> list[Scored]:
    """Turn examples into token ids, at most `limit` each; those without a token to predict are left out.

    Raises:
        DataError: None is left.
    """
    scored = [item for example in examples if (item := _tokenize(tokenizer, example, limit)) is not None]
    if not scored:
        raise DataError("no example is long enough to predict a token of it", hint="give longer texts")
    return scored


def _tokenize(tokenizer: PreTrainedTokenizerBase, example: Example, limit: int) -> Scored | None:
    if not example.prompt:
        ids = list(tokenizer(example.completion, truncation=True, max_length=limit)["input_ids"])
        first = 1
    else:
        prompt = list(tokenizer(example.prompt)["input_ids"])
        # Without special tokens, or the tokenizer would start a second text between prompt and completion.
        options = {"add_special_tokens": False, "truncation": True, "max_length": limit - 1}
        answer = list(tokenizer(example.completion, **options)["input_ids"])
        prompt = prompt[-(limit - len(answer)) :]
        ids, first = prompt + answer, max(1, len(prompt))
    return Scored(ids, first) if len(ids) > first else None


def _batch_nats(model: Any, batch: Sequence[Scored]) -> list[float]:
    ids, mask = padded([item.ids for item in batch], model.device)  # padding is never a target
    with torch.inference_mode():
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits  # (batch, length, vocabulary)
        return [_row_nats(logits[row], ids[row], item) for row, item in enumerate(batch)]


def _row_nats(logits: torch.Tensor, ids: torch.Tensor, item: Scored) -> float:
    # One row at a time in float32: a whole batch of vocabulary-wide rows would double the peak memory.
    end = len(item.ids)
    predicted = logits[item.first - 1 : end - 1].float()
    losses = functional.cross_entropy(predicted, ids[item.first : end], reduction="none")
    return float(losses.double().sum())
