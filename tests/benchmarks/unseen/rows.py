"""The rows of the study: what an adapter for a held-out task may be made of, and what each of them is.

nothing of the task        start, mean, multitask
the task's vector          nearest, mixture
K samples                  prompt-K, icm-K, icm-K-refine-STEPS, fresh-K (a LoRA from scratch, 60 steps)
first-16                   icm-16 with the lengths that nothing was learned about: what the episodes are worth
controls                   random (another direction), shuffled (another task's samples), mean-vector (all tasks')
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from icmlora.adapter.arithmetic import plus, times, truncated, with_modules
from icmlora.adapter.model import Adapter, LoraModule
from icmlora.base_models.kinds.likelihood import Scored
from icmlora.base_models.modality import BaseModel
from icmlora.fewshot.adapt import adapt
from icmlora.fewshot.finetune import FinetuneConfig, finetune
from icmlora.fewshot.start import FewShotStart
from icmlora.task_vectors.distances import nearest
from tests.benchmarks.unseen.fleet import StudyTask

Sample = TypeVar("Sample")

RANK = 16
"""Of what icm writes: the fleet's largest."""
MIXED = 3
"""Adapters in a mixture."""
_SHARPNESS = 0.1
"""Cosine distance by which a mixture's weight falls to a third."""


def support(samples: Sequence[Sample], count: int, seed: int) -> list[Sample]:
    """Draw samples; those of a smaller count are among those of a larger one with the same seed."""
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed)).tolist()
    return [samples[number] for number in order[:count]]


def generated(base: BaseModel, start: FewShotStart, samples: Sequence[Scored]) -> Adapter:
    """Return what `icm generate` makes."""
    adapter = start.adapter
    for adapted in adapt(base, start, samples):
        adapter = adapted.adapter
    return truncated(adapter, RANK)


def refined(base: BaseModel, adapter: Adapter, samples: Sequence[Scored], steps: int) -> Adapter:
    """Return what `icm generate --refine` makes of it."""
    for _, later in finetune(base, adapter, samples, FinetuneConfig(steps)):
        adapter = later
    return adapter


def random_steps(start: FewShotStart, samples: int, seed: int) -> Adapter:
    """Step as far as icm does from the start, in a random direction of the same rank."""
    draw = torch.Generator().manual_seed(seed)
    adapter = start.adapter
    for step in range(len(start.rates)):
        for number, module in enumerate(start.adapter.modules):
            a = torch.randn(RANK, module.a.shape[1], generator=draw)
            b = torch.randn(module.b.shape[0], RANK, generator=draw)
            size = float((b @ a).norm())
            longer = LoraModule(module.name, a, b * start.length(step, number, samples) / size)
            adapter = plus(adapter, [longer])
    return truncated(adapter, RANK)


@dataclass(frozen=True, eq=False)
class Known:
    """The tasks that are not held out, by their vectors."""

    tasks: dict[str, StudyTask]
    vectors: dict[str, NDArray[np.float32]]

    def nearest(self, vector: NDArray[np.float32]) -> Adapter:
        """Return the adapter of the nearest task."""
        return self.tasks[nearest(vector, self.vectors)[0].task].adapter()

    def mixture(self, vector: NDArray[np.float32]) -> Adapter:
        """Return the mean of the nearest adapters, weighted by how near they are."""
        near = nearest(vector, self.vectors)[:MIXED]
        weights = [math.exp((near[0].distance - one.distance) / _SHARPNESS) for one in near]
        parts = [self.tasks[one.task].adapter() for one in near]
        scaled = [times(part.modules, weight / sum(weights)) for part, weight in zip(parts, weights, strict=True)]
        total = with_modules(parts[0], scaled[0])
        for more in scaled[1:]:
            total = plus(total, more)
        return total


def prompts(texts: Sequence[str], numbers: Sequence[int], base: BaseModel, tokens: int) -> str:
    """Put samples one after the other, as they would stand in a prompt."""
    ids = [base.tokenizer(texts[number])["input_ids"][:tokens] for number in numbers]
    return "".join(base.tokenizer.decode(row) + "\n\n" for row in ids)


def shuffled_pairs(tasks: Sequence[StudyTask]) -> Iterator[tuple[StudyTask, StudyTask]]:
    """Pair every task with the next one of another family."""
    for number, task in enumerate(tasks):
        others = [*tasks[number + 1 :], *tasks[:number]]
        yield task, next((other for other in others if other.family != task.family), others[0])
