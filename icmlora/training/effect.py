"""The effect of an adapter on its base model, and how much of it other factors keep.

    noise  = KL(original || the same dW, rounded otherwise)     in nats a token, over some texts
    effect = KL(original || base) - noise
    kept   = 1 - (KL(original || other) - noise) / effect

It is 1 for the original and 0 for the bare base model, whatever the adapter's size or strength. Unlike the gain on
held-out text it needs no answers, takes few texts, and is not above 1 by luck. Where texts are prompts with answers,
the answers count, and an effect of more than half a nat counts as that: then it is below 0 for the bare base model.
An adapter that is hardly sure of its answers loses many with few nats, so of short ones a code also loses what it makes
the samples' own less likely, beyond what chance may bring, as a share of half of all: at 0.98 a hundredth of them.

Of one text in some dozens a code may lose all there is, because all later tokens attend to its first one, and the
smallest change may make them attend to another. A mean over few texts says little then of how precise a code is, so
where one is looked for, no text counts more than four times as much as the median. Most short answers lose nothing,
and a few of which the adapter is not sure lose much: none counts more than four times as much as the others' mean.

A base model in bfloat16 rounds after each layer, so factors of the same dW give slightly other predictions. Of a weak
adapter that is a hundredth of its whole effect, as much as a code may lose (docs/results/LOG.md).
"""

from __future__ import annotations

import math
from functools import cached_property
from typing import NamedTuple

import torch

from icmlora.base_models.running.lora_hooks import Factors
from icmlora.training.teacher import Shortfall, Teacher, shortfalls

LEAST_LOST = 1e-4
"""Shares of an effect below this are not told apart."""

_FEW = 3  # one text in so many
_OUTLIER = 4  # times the median
_LONG = 32  # predictions of a text at least that may be an outlier
_LEAST = 1e-6  # nats; an adapter with a smaller effect has none
# Nats of an effect on answers that count, at most: what goes beyond is how they look, and 2 % of it would be much of
# what they say. And the share of right answers that counts as all of them (docs/results/LOG.md).
_MOST_OF_ANSWERS = 0.5


def bounded(lost: torch.Tensor, fewest: int) -> torch.Tensor:
    """Return the shares that are lost of some texts (T,), none an outlier, if each has enough predictions for that."""
    return lost if fewest < _LONG else lost.clamp_max(_OUTLIER * lost.median().clamp_min(LEAST_LOST))


def bounded_answers(lost: torch.Tensor) -> torch.Tensor:
    """Return the shares that are lost of some short answers (T,), none an outlier among several."""
    if len(lost) == 1:
        return lost
    of_others = (lost.sum() - lost) / (len(lost) - 1)
    return lost.clamp_max(_OUTLIER * of_others.clamp_min(LEAST_LOST))


def share_of_right(less_right: torch.Tensor) -> torch.Tensor:
    """Return what share of what right answers count is lost where they are so much less likely, on average."""
    return less_right.mean() / _MOST_OF_ANSWERS


def lost_of_right(less_right: torch.Tensor) -> float:
    """Return that share for some answers (T,), less the standard error of the average; at least 0."""
    error = less_right.std() / math.sqrt(len(less_right)) if len(less_right) > 1 else 0.0
    return max(float(share_of_right(less_right - error)), 0.0)


class Lost(NamedTuple):
    """The share of an adapter's effect that other factors lose: 0 for the adapter itself, 1 for none."""

    of_all: float  # texts
    of_most: float  # but for outliers among them
    of_right: float = 0.0  # answers, if they are short

    @property
    def counted(self) -> float:
        """What tells whether a code keeps its share."""
        return max(self.of_all, self.of_right)

    @property
    def worst(self) -> float:
        """The same but for outliers among texts: what tells how much finer a code has to be."""
        return max(self.of_most, self.of_right)


class Effect:
    """The effect of an adapter on the examples of its teacher."""

    def __init__(self, teacher: Teacher) -> None:
        self._teacher = teacher

    @cached_property
    def noise(self) -> float:
        """What the rounding of the base model's arithmetic alone makes of it, in nats."""
        rounded = {name: _rescaled(*pair) for name, pair in self._teacher.original.items()}
        return float(self._shortfall(rounded, _FEW).divergence)

    @cached_property
    def whole(self) -> float:
        """What counts of it, in nats; of an adapter that does less than the noise, as much as that."""
        return min(self._all, _MOST_OF_ANSWERS) if self._teacher.has_prompts else self._all

    @property
    def beyond(self) -> float:
        """How many times what counts of it the whole effect is."""
        return self._all / self.whole

    def lost(self, factors: Factors, *, of_few: bool = False) -> Lost:
        """Return the share that other factors lose; of few of the texts in less time."""
        every = _FEW if of_few else 1
        short, of_the_base = self._shortfall(factors, every), self._of_the_base.of_each.clamp_min(_LEAST)
        whole = self.whole * float(of_the_base[::every].mean() / of_the_base.mean())
        of_each = (short.of_each - self.noise) / whole
        if self._teacher.has_prompts and short.fewest < _LONG:
            of_answers = float(bounded_answers(of_each).mean())
            return Lost(of_all=of_answers, of_most=of_answers, of_right=lost_of_right(short.less_right))
        of_most = bounded(of_each, short.fewest).mean()
        return Lost(of_all=(float(short.divergence) - self.noise) / whole, of_most=float(of_most))

    @cached_property
    def _all(self) -> float:
        return max(float(self._of_the_base.divergence) - self.noise, self.noise, _LEAST)

    @cached_property
    def _of_the_base(self) -> Shortfall:
        return self._shortfall({})

    @torch.no_grad()
    def _shortfall(self, factors: Factors, every: int = 1) -> Shortfall:
        (short,) = shortfalls(self._teacher.base, [(self._teacher, factors, range(0, len(self._teacher), every))])
        return short


def _rescaled(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return other factors of the same dW, (r, in) and (out, r), all of whose values round otherwise."""
    scales = torch.linspace(1.1, 1.9, len(a), device=a.device)  # none is a power of two, which would round alike
    return a.float() * scales[:, None], b.float() / scales
