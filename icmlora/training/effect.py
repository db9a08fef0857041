"""Measure an adapter's effect on its base model, and how much of it other factors keep.

    noise  = KL(original || the same dW, rounded differently)   in nats per token, over some texts
    effect = KL(original || base) - noise
    kept   = 1 - (KL(original || other) - noise) / effect

`kept` is 1 for the original and 0 for the bare base model, for adapters of any size or strength. Unlike the gain on
held-out text it needs no answers, takes few texts, and does not exceed 1 by luck. For prompts with answers, only the
answers count, and the effect is capped at half a nat: the bare base model can then score below 0. If an adapter is
unsure of its answers, a few nats change many of them. For short answers the loss is therefore at least the drop in
probability of the samples' own answers, beyond chance, relative to half of all: at 0.98 that is a hundredth of them.

On one text in a few dozen a code may lose the whole effect: all later tokens attend to the first one, and the smallest
change may make them attend to another. A mean over few texts then says little about a code's precision, so the search
for a precision counts each text at most four times as much as the median. Most short answers lose nothing and a few
uncertain ones lose much, so each counts at most four times as much as the mean of the others.

A base model in bfloat16 rounds after each layer, so other factors of the same dW give slightly different predictions.
For a weak adapter that is a hundredth of its whole effect, as much as a code may lose (docs/results/LOG.md).
"""

from __future__ import annotations

import math
from functools import cached_property
from typing import NamedTuple

import torch

from icmlora.base_models.running.lora_hooks import Factors
from icmlora.training.teacher import Shortfall, Teacher, shortfalls

MIN_LOST = 1e-4
"""Smaller shares of an effect are not distinguished."""

_FEW = 3  # stride through the texts for a quick estimate
_OUTLIER = 4  # times the median, or the mean of the others
_LONG = 32  # minimum predictions of a text that may be an outlier
_MIN_EFFECT = 1e-6  # nats; smaller effects count as this
# Limit in nats of an effect on answers: beyond it lies their form, and 2 % of that would be much of their content. Also
# the share of right answers that counts as all of them (docs/results/LOG.md).
_MAX_OF_ANSWERS = 0.5


def bounded(lost: torch.Tensor, fewest: int) -> torch.Tensor:
    """Return the shares lost on texts (T,), outliers clamped if each text has enough predictions."""
    return lost if fewest < _LONG else lost.clamp_max(_OUTLIER * lost.median().clamp_min(MIN_LOST))


def bounded_answers(lost: torch.Tensor) -> torch.Tensor:
    """Return the shares lost on short answers (T,), outliers clamped if there are several."""
    if len(lost) == 1:
        return lost
    of_others = (lost.sum() - lost) / (len(lost) - 1)
    return lost.clamp_max(_OUTLIER * of_others.clamp_min(MIN_LOST))


def share_of_right(less_right: torch.Tensor) -> torch.Tensor:
    """Return the mean drop in probability of right answers as a share of the drop that counts as all."""
    return less_right.mean() / _MAX_OF_ANSWERS


def lost_of_right(less_right: torch.Tensor) -> float:
    """Return that share for answers (T,), less the standard error of the mean; at least 0."""
    error = less_right.std() / math.sqrt(len(less_right)) if len(less_right) > 1 else 0.0
    return max(float(share_of_right(less_right - error)), 0.0)


class EffectLoss(NamedTuple):
    """Shares of an adapter's effect that other factors lose: 0 for the adapter itself, 1 for none."""

    of_all: float  # on all texts
    of_most: float  # on the texts with outliers clamped
    of_right: float = 0.0  # of right answers, if they are short

    @property
    def counted(self) -> float:
        """Share that decides whether a code keeps enough."""
        return max(self.of_all, self.of_right)

    @property
    def worst(self) -> float:
        """Share with outliers clamped: decides how much finer a code has to be."""
        return max(self.of_most, self.of_right)


class Effect:
    """The effect of an adapter on the examples of its teacher."""

    def __init__(self, teacher: Teacher) -> None:
        self._teacher = teacher

    @cached_property
    def noise(self) -> float:
        """Divergence from the rounding of the base model's arithmetic alone, in nats."""
        rounded = {}
        for name, (a, b) in self._teacher.original.items():
            # Other factors of the same dW: no scale is a power of two, which would round alike.
            scales = torch.linspace(1.1, 1.9, len(a), device=a.device)
            rounded[name] = a.float() * scales[:, None], b.float() / scales
        return float(self._shortfall(rounded, _FEW).divergence)

    @cached_property
    def whole(self) -> float:
        """Effect that counts, in nats; for an adapter below the noise, the noise."""
        return min(self._all, _MAX_OF_ANSWERS) if self._teacher.has_prompts else self._all

    @property
    def uncapped_ratio(self) -> float:
        """Ratio of the uncapped effect to the effect that counts."""
        return self._all / self.whole

    def lost(self, factors: Factors, *, of_few: bool = False) -> EffectLoss:
        """Return the share that other factors lose; `of_few` reads a third of the texts."""
        every = _FEW if of_few else 1
        short, of_the_base = self._shortfall(factors, every), self._of_the_base.of_each.clamp_min(_MIN_EFFECT)
        whole = self.whole * float(of_the_base[::every].mean() / of_the_base.mean())
        of_each = (short.of_each - self.noise) / whole
        if self._teacher.has_prompts and short.fewest < _LONG:
            of_answers = float(bounded_answers(of_each).mean())
            return EffectLoss(of_all=of_answers, of_most=of_answers, of_right=lost_of_right(short.less_right))
        of_most = bounded(of_each, short.fewest).mean()
        return EffectLoss(of_all=(float(short.divergence) - self.noise) / whole, of_most=float(of_most))

    @cached_property
    def _all(self) -> float:
        return max(float(self._of_the_base.divergence) - self.noise, self.noise, _MIN_EFFECT)

    @cached_property
    def _of_the_base(self) -> Shortfall:
        return self._shortfall({})

    @torch.no_grad()
    def _shortfall(self, factors: Factors, every: int = 1) -> Shortfall:
        (short,) = shortfalls(self._teacher.base, [(self._teacher, factors, range(0, len(self._teacher), every))])
        return short
