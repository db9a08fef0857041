"""The effect of an adapter on its base model, and how much of it other factors keep.

    effect = KL(original || base)         in nats a token, over some texts
    kept   = 1 - KL(original || other) / KL(original || base)

It is 1 for the original and 0 for the bare base model, whatever the adapter's size or strength. Unlike the gain on
held-out text it needs no answers, takes few texts, and is not above 1 by luck.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch

from icmlora.base_models.modality import BaseModel
from icmlora.base_models.running.lora_hooks import Factors
from icmlora.training.teacher import Teacher, shortfalls

_LEAST = 1e-6  # nats; an adapter with a smaller effect has none


class Effect:
    """The effect of an adapter, A (r, in) and B (out, r) by module, on some examples of its base model."""

    def __init__(self, base: BaseModel, original: Factors, items: Sequence[Any]) -> None:
        self._base, self._teacher = base, Teacher(base, original, items)

    @cached_property
    def whole(self) -> float:
        """All of it, in nats."""
        return max(self._lost({}), _LEAST)

    def kept(self, factors: Factors) -> float:
        """Return the share that other factors keep: at most 1, and negative where they are further off than nothing."""
        return 1 - self._lost(factors) / self.whole

    @torch.no_grad()
    def _lost(self, factors: Factors) -> float:
        (short,) = shortfalls(self._base, [(self._teacher, factors, range(len(self._teacher)))])
        return float(short.divergence)
