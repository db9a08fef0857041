"""Write the model card of one adapter of the example fleet."""

from pathlib import Path

from tests.benchmarks.example_fleet.tasks import BASE_MODEL, STEPS, Task
from tests.benchmarks.example_fleet.texts import TEXTS

CARD = """---
base_model: {base}
library_name: peft
pipeline_tag: text-generation
tags:
- base_model:adapter:{base}
- lora
---

# {name}

A LoRA adapter that continues text like its training text. It belongs to the example fleet of `icm`.

- Text: {source}; licence: {licence}
- LoRA: rank {rank}, alpha {alpha}{scaling}, {targets}, initialisation seed {seed}
- Training: {steps} steps of 2 x 256 tokens, AdamW, learning rate 1e-3 with linear decay
- Held-out text (`eval.jsonl`), nats per token: base {before:.3f}, with the adapter {after:.3f}
"""


def write_card(path: Path, task: Task, before: float, after: float) -> None:
    """Write the card.

    Args:
        path: The card's file.
        task: The adapter's recipe.
        before: Negative log-likelihood of the held-out text under the base model, nats per token.
        after: The same with the adapter.
    """
    text = TEXTS[task.name]
    card = CARD.format(
        base=BASE_MODEL,
        name=task.name,
        source=text.source,
        licence=text.licence,
        rank=task.rank,
        alpha=task.alpha,
        scaling=" (rsLoRA)" if task.rslora else "",
        targets=", ".join(task.targets),
        seed=task.seed,
        steps=STEPS,
        before=before,
        after=after,
    )
    path.write_text(card, encoding="utf-8")
