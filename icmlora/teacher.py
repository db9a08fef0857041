"""What an adapter predicts on some texts, kept small: of each next-token distribution its likeliest tokens.

    text ──base + adapter──▶ log p (T, V) ──K likeliest, and the rest as one──▶ Wanted (T, K), (T, K + 1)
                                                                                   │
    base + code ──▶ logits (rows, T, V) ──log q of the same K + 1──▶ KL(p || q) ◀──┘

The rest of a vocabulary shares a few per cent of the probability; as one event it still pulls as a whole, and what is
kept of a text takes a hundredth of its logits. So each text goes through the adapted model once, however often it is
used. The divergence of the coarser distributions is at most that of the full ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from icmlora.base_model import BaseModel
from icmlora.generator.relaxed import Factors
from icmlora.padding import padded

KEPT = 128
"""Tokens kept of each distribution."""
_LEAST = 1e-6
"""Smallest probability of the rest, so that its logarithm is finite."""


@dataclass(frozen=True, eq=False)
class Wanted:
    """The distributions after each token of one text."""

    ids: list[int]
    """The text, T token ids."""
    tokens: torch.Tensor
    """int64, shape (T, K): the likeliest next tokens."""
    log_p: torch.Tensor
    """float32, shape (T, K + 1): their log probabilities, and that of all others together."""


class Teacher:
    """The original's predictions, made when a text is first asked for.

    Args:
        base: The adapter's base model.
        original: Its factors.
        texts: Token ids of texts.
    """

    def __init__(self, base: BaseModel, original: Factors, texts: Sequence[list[int]]) -> None:
        self._base, self._original, self._texts = base, original, texts
        self._known: dict[int, Wanted] = {}

    def __len__(self) -> int:
        return len(self._texts)

    def divergence(self, code: Factors, numbers: Sequence[int]) -> torch.Tensor:
        """Return KL(original || code) of the next token in nats, averaged over the tokens of some texts.

        Args:
            code: Factors of the other adapter, with or without gradients; none are the base model.
            numbers: Which texts.
        """
        wanted = [self._wanted(number) for number in numbers]
        ids, mask = padded([item.ids for item in wanted], self._base.model.device)
        with added(self._base.model, code):
            logits = self._base.model(ids, attention_mask=mask, use_cache=False).logits  # (rows, T, V)
        nats = [_nats(item, row[: len(item.ids)]) for item, row in zip(wanted, logits, strict=True)]
        return torch.stack(nats).sum() / mask.sum()

    @torch.no_grad()
    def _wanted(self, number: int) -> Wanted:
        if number not in self._known:
            ids = self._texts[number]
            with added(self._base.model, self._original):
                row = torch.tensor([ids], device=self._base.model.device)
                logits = self._base.model(row, use_cache=False).logits[0]  # (T, V)
            tokens = logits.topk(min(KEPT, logits.shape[-1] - 1), dim=-1).indices
            self._known[number] = Wanted(ids, tokens, _log_shares(logits, tokens))
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
