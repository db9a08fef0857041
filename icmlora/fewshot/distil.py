"""Distil the effect of samples in a prompt into an adapter that is served without them (context distillation).

    teacher   base + adapter for a context:  half of the samples, then the others ──▶ predictions of these, and the
                                                                                      same the other way
    student   base + adapter:                each sample alone ──▶ the same predictions, by gradient steps

minimise   KL(teacher || student)          Askell et al., arXiv 2112.00861; Snell et al., arXiv 2209.15189

The steps also learn how the samples predict each other, and other text of the task may contradict that. So the adapter
goes half of the way, where it keeps most of the benefit and little of the harm (Wortsman et al., arXiv 2109.01903;
docs/results/LOG.md, 2026-11-30).
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from icmlora.adapter.arithmetic import between
from icmlora.adapter.model import Adapter
from icmlora.base_models.modality import IGNORED, BaseModel, Prepared
from icmlora.base_models.running.lora_hooks import Factors, added, factors_of
from icmlora.errors import DataError
from icmlora.fewshot.finetune import FinetuneConfig, descend
from icmlora.io.devices import uploaded
from icmlora.training.teacher import Teacher, shortfalls, target

_GROUP = 16  # samples read together
_TOGETHER = 2560  # tokens read together
_BETWEEN = 8  # most tokens between two samples


@dataclass(frozen=True)
class DistilConfig:
    """Options of distillation."""

    steps: int
    batch: int = 4  # texts a step
    learning_rate: float = 2e-3
    part: float = 0.5  # of the way from the adapter to the result of the steps
    seed: int = 0


def distil(
    base: BaseModel, adapter: Adapter, teacher: Adapter, samples: Sequence[Prepared], config: DistilConfig
) -> Iterator[tuple[float, Adapter]]:
    """Distil a teacher's predictions after samples into an adapter; yields each step's divergence and adapter.

    Only for base models whose samples can precede others (`Modality.takes_context`). The divergence is measured at the
    end point of the steps so far, in nats per token.

    Raises:
        DataError: No two samples fit into what the base model reads.
    """
    prompted = PromptedTeacher(base, factors_of(teacher), samples, config)

    def divergence(factors: Factors, batch: Sequence[int]) -> AbstractContextManager[torch.Tensor]:
        (short,) = shortfalls(base, [(prompted, factors, batch)])
        return nullcontext(short.divergence)

    schedule = FinetuneConfig(config.steps, config.learning_rate, config.batch, config.seed)
    steps = descend(base.device, adapter, divergence, len(prompted), schedule)
    return ((nats, between(adapter, there, config.part)) for nats, there in steps)


class PromptedTeacher(Teacher):
    """Predicts the samples in each half of a group after the other half.

    Args:
        base: The base model.
        original: Factors to add to it.
        samples: Two or more.
        config: Its seed draws the halves.

    Raises:
        DataError: No two samples fit into what the base model reads.
    """

    def __init__(self, base: BaseModel, original: Factors, samples: Sequence[Prepared], config: DistilConfig) -> None:
        super().__init__(base, original, list(samples))
        longest, room = max(item.size for item in samples) + _BETWEEN, base.within(_TOGETHER)
        if room < 2 * longest:
            fact = f"two samples of {longest} tokens exceed the {room} tokens that the base model reads"
            raise DataError(fact, hint="leave out --distil")
        order = list(range(len(samples)))
        random.Random(config.seed).shuffle(order)  # noqa: S311 - an order, not secrets
        # Groups of about equal size, with at least two samples in each.
        count = max(1, min(len(order) // 2, math.ceil(len(order) / min(_GROUP, room // longest))))
        bounds = (len(order) * number // count for number in range(count + 1))
        with torch.no_grad(), added(base.model, original):
            for first, end in itertools.pairwise(bounds):
                middle = first + (end - first) // 2
                self._read(order[first:middle], order[middle:end])
                self._read(order[middle:end], order[first:middle])

    def _read(self, before: Sequence[int], after: Sequence[int]) -> None:
        """Store the predictions for samples that follow others."""
        modality, items = self.base.modality, [self._items[number] for number in (*before, *after)]
        (text,) = modality.joined(self.base, items, _TOGETHER)
        (logits,) = modality.logits(self.base, [text])
        rows = logits[self._scored(text, len(logits))]
        counts = [self._items[number].count for number in after]
        for number, predicted in zip(after, torch.split(rows[-sum(counts) :], counts), strict=True):
            item = self._items[number]
            scored = self._scored(item, item.size)
            spread = predicted.new_zeros(item.size, predicted.shape[-1])
            spread[scored] = predicted
            self._targets[number] = target(self.base, item, spread, scored)

    def _scored(self, item: Prepared, predictions: int) -> torch.Tensor:
        """Return which predictions of an item are scored, bool of shape (predictions,)."""
        wanted = self.base.modality.wanted(item) or ()
        first = predictions - len(wanted)
        marks = [place >= first and wanted[place - first] != IGNORED for place in range(predictions)]
        return uploaded(marks, self.base.device).bool()
