"""Write the model card of one adapter of the example fleet."""

from dataclasses import dataclass
from pathlib import Path

from tests.benchmarks.example_fleet.tasks import BASE_MODEL, Schedule, Task
from tests.benchmarks.example_fleet.texts import Text

CARD = """---
base_model: {base}
library_name: peft
pipeline_tag: text-generation
tags:
- base_model:adapter:{base}
- lora
---

# {name}

A LoRA adapter that continues text like its training text. It belongs to the {fleet} fleet of `icm`.

- Text: {source}; licence: {licence}
- LoRA: rank {rank}, alpha {alpha}{scaling}, {targets}, initialisation seed {seed}
- Training: {steps} steps of {batch} x {length} tokens, AdamW, learning rate {rate} with linear decay
- Held-out text (`eval.jsonl`), nats per token: base {before:.3f}, with the adapter {after:.3f}
"""


@dataclass(frozen=True)
class Recipe:
    """Everything that made an adapter."""

    fleet: str
    """What the fleet is called in the card."""
    task: Task
    text: Text
    schedule: Schedule


def write_card(path: Path, recipe: Recipe, before: float, after: float) -> None:
    """Write the card.

    Args:
        path: The card's file.
        recipe: What made the adapter.
        before: Negative log-likelihood of the held-out text under the base model, nats per token.
        after: The same with the adapter.
    """
    task, text, schedule = recipe.task, recipe.text, recipe.schedule
    card = CARD.format(
        base=BASE_MODEL,
        fleet=recipe.fleet,
        name=task.name,
        source=text.source,
        licence=text.licence,
        rank=task.rank,
        alpha=task.alpha,
        scaling=" (rsLoRA)" if task.rslora else "",
        targets=", ".join(task.targets),
        seed=task.seed,
        steps=schedule.steps,
        batch=schedule.batch,
        length=schedule.length,
        rate=f"{schedule.learning_rate:.0e}".replace("e-0", "e-"),
        before=before,
        after=after,
    )
    path.write_text(card, encoding="utf-8")
