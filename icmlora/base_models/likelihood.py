"""How well a causal language model predicts text.

    text -> tokens t0 t1 ... tn -> sum of -log p(t_i | t_0 .. t_i-1) over the scored tokens = nats

Losses are sums over predicted tokens, so that texts of different length count by their length.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional
from transformers import PreTrainedTokenizerBase

from icmlora.base_models.examples import Example
from icmlora.base_models.modality import BaseModel, Score
from icmlora.errors import DataError


@dataclass(frozen=True)
class NllResult:
    """Negative log-likelihood of text under a model."""

    nats: float  # sum over the scored tokens
    tokens: int  # how many were scored
    # Length in UTF-8 of the text that those tokens spell; a character that a limit cuts counts as three.
    utf8_bytes: int

    @classmethod
    def of(cls, score: Score) -> NllResult:
        """Return a score in these terms, whatever its metric is."""
        return score if isinstance(score, cls) else cls(score.value * score.count, score.count, score.utf8_bytes)

    @property
    def nats_per_token(self) -> float:
        """Mean negative log-likelihood."""
        return self.nats / self.tokens

    @property
    def value(self) -> float:
        """The metric: nats per token."""
        return self.nats_per_token

    @property
    def count(self) -> int:
        """How many tokens were scored."""
        return self.tokens

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

    @property
    def size(self) -> int:
        """How many tokens are read."""
        return len(self.ids)


def nll(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    max_tokens: int = 256,
    batch_size: int = 1,
) -> NllResult:
    """Score examples by teacher forcing; of one with a prompt only the completion is scored."""
    # Of a prompt the last tokens that fit are read. A batch size above 1 pays on accelerators only.
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


def tokenized(tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], limit: int) -> list[Scored]:
    """Turn examples into token ids, at most `limit` each; those without a token to predict are left out."""
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
        # Cut the prompt at its beginning: the tokens next to the answer say most about it.
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
    # float64: a sum over thousands of tokens would lose digits that a retained gain needs.
    return float(losses.double().sum())


def padded(rows: Sequence[Sequence[int]], device: torch.device | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return token ids and attention mask, both int64 of shape (rows, T)."""
    # Padding is on the right and masked: in a causal model no real token sees it.
    length = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (length - len(row))] for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows], device=device)
    return ids, mask


def next_token_logits(base: BaseModel, items: Sequence[Scored], *, from_leaf: bool = False) -> list[torch.Tensor]:
    """Return the next-token logits of each text, (T, vocabulary) without its padding."""
    # `from_leaf` begins at embeddings that take gradients: no parameter of the base model does.
    ids, mask = padded([item.ids for item in items], base.device)
    inputs = {"inputs_embeds": _leaf(base, ids)} if from_leaf else {"input_ids": ids}
    # A single text has no padding, and without a mask attention may use its fastest kernel.
    if len(items) > 1:
        inputs["attention_mask"] = mask
    logits = base.model(**inputs, use_cache=False).logits  # (texts, T, vocabulary)
    return [row[: len(item.ids)] for row, item in zip(logits, items, strict=True)]


def summed_loss(base: BaseModel, items: Sequence[Scored]) -> torch.Tensor:
    """Return the loss of all scored tokens in nats, with gradients that reach every module."""
    rows = next_token_logits(base, items, from_leaf=True)
    return torch.stack([_row_loss(logits, item) for logits, item in zip(rows, items, strict=True)]).sum()


def _leaf(base: BaseModel, ids: torch.Tensor) -> torch.Tensor:
    # Autograd only runs from a leaf that takes gradients, and every parameter of the base model is frozen.
    embedded: torch.Tensor = base.model.get_input_embeddings()(ids)  # (texts, T, d)
    return embedded.detach().requires_grad_()


def _row_loss(logits: torch.Tensor, item: Scored) -> torch.Tensor:
    # The logits at token t predict token t + 1.
    predicted = logits[item.first - 1 : -1].float()  # (scored tokens, vocabulary)
    wanted = torch.tensor(item.ids[item.first :], device=logits.device)
    return functional.cross_entropy(predicted, wanted, reduction="sum")
