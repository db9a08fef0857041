"""How a generator is trained."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass

from icmlora.errors import GeneratorError


@dataclass(frozen=True)
class TrainConfig:
    """Options of one training run; stored with it, so that a resumed run goes on with the same ones."""

    steps: int
    """Optimiser steps; each sees one adapter."""
    learning_rate: float = 4e-3
    """Peak of a cosine schedule with a linear warm-up."""
    weight_decay: float = 0.01
    """AdamW's, on all parameters."""
    warmup: float = 0.1
    """Share of the steps over which the learning rate rises."""
    view_dropout: float = 0.5
    """Chance that a step does not see the adapted view, which a new task does not have."""
    final_share: float = 0.5
    """Chance that a step sees a task's final adapter rather than one of its earlier checkpoints."""
    seed: int = 0
    """Every step draws from its own stream, so a resumed run repeats the uninterrupted one bit for bit on a CPU."""

    def __post_init__(self) -> None:
        """Refuse options that describe no run."""
        shares = (self.warmup, self.view_dropout, self.final_share)
        if self.steps < 1 or self.learning_rate <= 0 or any(not 0 <= share <= 1 for share in shares):
            raise GeneratorError("the training options are out of range")

    def rate_at(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        rising = max(1, round(self.steps * self.warmup))
        if step < rising:
            return self.learning_rate * (step + 1) / rising
        done = (step - rising) / max(1, self.steps - rising)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * done))

    def to_json(self) -> str:
        """Serialise with sorted keys."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> TrainConfig:
        """Parse what `to_json` wrote.

        Raises:
            GeneratorError: Not the JSON of a training configuration.
        """
        try:
            return cls(**json.loads(text))
        except (ValueError, TypeError) as error:
            raise GeneratorError(f"the training configuration cannot be read ({error})") from error


def steps_for(adapters: int) -> int:
    """Return how many steps a fleet of so many adapters (checkpoints included) is trained for by default."""
    return min(20_000, max(1_000, 10 * adapters))
