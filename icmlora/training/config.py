"""How a generator is trained."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass

from icmlora.errors import GeneratorError

DEFAULT_QUALITY = 4  # of a first generator's codes
REFINE_STEPS = 160  # optimiser steps that refine a code
STEP_PARAMETERS = 1 << 20  # most parameters of an adapter that a step sees
STACKED = 8  # adapters per step on a card
_MAX_TURN = 8

# Default steps and learning rates; the help of `icm train` shows these.
SMALL_FLEET = 16  # runs with fewer tasks are short: training hardly pays there
SMALL_STEPS_PER_TASK, MIN_SMALL_STEPS, SMALL_RATE = 20, 200, 8e-3
STEPS_PER_ADAPTER, MIN_STEPS, MAX_STEPS, RATE = 8, 1_000, 20_000, 4e-3
# Small adapters offer little to learn: 300 adapters of 896 or 1,792 parameters take 158.6 kB with their generator, both
# after 500 steps and after 1,000.
FREE_STEPS, PARAMETERS_PER_STEP = 500, 1_000  # above the first, at most one step per that many parameters
MIN_STACKED_STEPS = 150  # optimiser steps of a run whose steps see several adapters each


@dataclass(frozen=True)
class TrainConfig:
    """Options of one training run, stored with it for resuming."""

    # A small fleet starts from its own norm tables, and most of the gain comes in the first fifth of the steps. Its
    # schedule is short as a whole and ends at a rate of zero, so it needs no early stopping: the same seed gives the
    # same bytes, however often a run is interrupted. An explicit number of steps counts as a long run and keeps a large
    # fleet's rate.

    steps: int  # adapters drawn; an optimiser step sees one of them, several with processes or on a card
    turn: int = 1  # draws in a row that see the same adapter; above 1 they see different modules of a large one
    learning_rate: float = RATE  # peak of a cosine schedule with a linear warm-up
    weight_decay: float = 0.01  # AdamW's, on all parameters
    warmup: float = 0.1  # share of the steps over which the learning rate rises
    view_dropout: float = 0.5  # chance that a step does not see the adapted view, which a new task does not have
    # Chance that a step sees a task's final adapter rather than one of its earlier checkpoints.
    final_share: float = 0.5
    # Every step draws from its own stream, so a resumed run repeats the uninterrupted one bit for bit on a CPU.
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise `GeneratorError` if an option is out of range."""
        shares = (self.warmup, self.view_dropout, self.final_share)
        if self.steps < 1 or self.turn < 1:
            raise GeneratorError(f"training needs at least 1 step, not {self.steps}")
        if self.learning_rate <= 0 or any(not 0 <= share <= 1 for share in shares):
            raise GeneratorError("the training options are out of range")

    @classmethod
    def default(
        cls,
        tasks: int,
        adapters: int,
        *,
        parameters: int | None = None,
        steps: int | None = None,
        learning_rate: float | None = None,
        seed: int = 0,
        stacked: int = 1,
    ) -> TrainConfig:
        """Choose a run's options from its numbers of tasks and adapters, checkpoints included.

        Explicit steps and rate override the defaults. `parameters` is the total over all adapters, if known; `stacked`
        is the number of adapters per optimiser step.
        """
        small = is_small(tasks, steps)
        few = max(MIN_SMALL_STEPS, SMALL_STEPS_PER_TASK * tasks)
        default_steps = stretched(few if small else steps_for(adapters, parameters), stacked)
        default_rate = SMALL_RATE if small else RATE
        mean = 0 if parameters is None else parameters // max(adapters, 1)
        return cls(
            steps=default_steps if steps is None else steps,
            turn=min(_MAX_TURN, max(1, mean // STEP_PARAMETERS)),
            learning_rate=default_rate if learning_rate is None else learning_rate,
            seed=seed,
        )

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
        """Parse the output of `to_json`; raise `GeneratorError` for anything else."""
        try:
            return cls(**json.loads(text))
        except (ValueError, TypeError) as error:
            raise GeneratorError(f"the training configuration cannot be read ({error})") from error


def is_small(tasks: int, steps: int | None) -> bool:
    """Return whether a run is a small fleet's short one: few tasks and no explicit number of steps."""
    return steps is None and tasks < SMALL_FLEET


def stretched(steps: int, stacked: int) -> int:
    """Return how many adapters to draw in place of `steps` if each optimiser step sees `stacked` of them.

    A run needs a minimum of optimiser steps, however many adapters each sees. Ten adapters took 0.7 % more bytes after
    100 steps of eight than after 200 steps of one, but no more after 150 (docs/results/LOG.md).
    """
    return steps if stacked == 1 else max(steps, stacked * min(MIN_STACKED_STEPS, 3 * steps // 4))


def steps_for(adapters: int, parameters: int | None = None) -> int:
    """Return the number of training steps for adapters (checkpoints included) with `parameters` in all."""
    wanted = min(MAX_STEPS, max(MIN_STEPS, STEPS_PER_ADAPTER * adapters))
    return wanted if parameters is None else min(wanted, max(FREE_STEPS, parameters // PARAMETERS_PER_STEP))
