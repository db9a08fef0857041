"""The model card of a written adapter: where it comes from and what it kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import yaml

from icm_cli.text import escape

_CARD = """\
---
{front}---

# {task}

A LoRA adapter for `{base}`, written by icm {how}.
{untrained}
| | |
|---|---|
| rung | {rung} |
| generator | version {version}, sha256 `{generator}` |
| relative dW error | {error} |
| retained gain | {gain} |

Relative dW error is the squared Frobenius error of the weight change against the original adapter. Retained gain is
(loss of the base model - loss of this adapter) / (loss of the base model - loss of the original) on held-out text.
"""

_ORIGINAL_CARD = """\
---
{front}---

# {task}

The original LoRA adapter for `{base}`, byte for byte as it was given to icm.

| | |
|---|---|
| rung | original |
| weights | sha256 `{weights}` |
"""

_UNTRAINED = """
No adapter was trained for this task: the original was itself generated from samples of the task. So the error below is
against a generated adapter, and nothing is known of what a trained one would do: measure it on text of your own.
"""

_HOW = {
    "residual": "from the task's stored code and the residual beside it",
    "code": "from the task's stored code",
    "generate": "from the task's vectors alone; it is a prediction, not a copy of the original adapter",
}


class NamedGenerator(Protocol):
    """What a card says of a generator, whether it lies in a store or in a bundle."""

    @property
    def blob(self) -> str:
        """SHA-256 of its file."""

    @property
    def version(self) -> int:
        """Which one it is of its base model."""


@dataclass(frozen=True)
class Provenance:
    """Where an adapter that a generator made comes from; None where a figure was not measured."""

    task: str
    base_model: str
    rung: Literal["residual", "code", "generate"]
    generator: NamedGenerator
    dw_error: float | None
    retained_gain: float | None
    seed: int | None
    is_generated: bool
    """Nobody trained the original: it was generated for a task that had none."""

    def metadata(self) -> dict[str, str]:
        """Return header text for the tensor file."""
        fields = {"icm_task": self.task, "icm_rung": self.rung, "icm_generator": self.generator.blob}
        return fields if self.seed is None else fields | {"icm_seed": str(self.seed)}


def card_text(provenance: Provenance) -> str:
    """Write the card; the same provenance gives the same text."""
    sampled = "" if provenance.seed is None else f" (sampled with seed {provenance.seed})"
    untrained = _UNTRAINED if provenance.is_generated else ""
    return _CARD.format(
        front=front_matter(provenance.base_model),
        task=provenance.task,
        base=quoted(provenance.base_model),
        how=_HOW[provenance.rung] + sampled,
        untrained=untrained,
        rung=provenance.rung,
        version=provenance.generator.version,
        generator=provenance.generator.blob,
        error=_figure(provenance.dw_error),
        gain=_figure(provenance.retained_gain),
    )


def original_card(task: str, base_model: str, weights: str) -> str:
    """Write the card of an original that came without one; `weights` is the digest of its tensor file."""
    return _ORIGINAL_CARD.format(front=front_matter(base_model), task=task, base=quoted(base_model), weights=weights)


def front_matter(base_model: str) -> str:
    """Return the YAML head that the hub reads."""
    fields = {
        "base_model": base_model,
        "library_name": "peft",
        "tags": ["lora", "icm", f"base_model:adapter:{base_model}"],
    }
    # The label comes from outside: the YAML library quotes what needs quoting.
    return yaml.safe_dump(fields, sort_keys=True, allow_unicode=True)


def quoted(label: str) -> str:
    """Make a label from outside fit between two backticks of one line."""
    return escape(label).replace("`", "'")


def _figure(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.4f}"
