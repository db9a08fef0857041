"""Model cards (README.md) of the adapters that icm writes; the same facts give the same bytes."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import yaml

from icmlora.fleet.measure.metric_result import measured_in
from icmlora.formats.peft.peft import CONTEXT_MESSAGES_NAME, CONTEXT_NAMES, CONTEXT_TEXT_NAME
from icmlora.io.text import counted, escape
from registry.manifests import Claim, Generator, WithRelativeError
from registry.names import split_label

if TYPE_CHECKING:
    from icmlora.fewshot.guard import Guard

_CARD = """\
---
{front}---

# {task}

A LoRA adapter for `{base}`, written by icm {how}.
{untrained}{context}
| | |
|---|---|
| source | {rung} |
| generator | version {version}, sha256 `{generator}` |
| relative error | {error} |
| retained gain | {gain} |

dW is the weight change of the original, and dW' is the weight change of this adapter. The relative error is
||dW' - dW|| / ||dW|| (Frobenius norms over all modules). The retained gain is
(loss of the base model - loss of this adapter) /
(loss of the base model - loss of the original) on held-out text.
"""

_ORIGINAL_CARD = """\
---
{front}---

# {task}

The original LoRA adapter for `{base}`, byte for byte as it was ingested.

| | |
|---|---|
| source | original |
| weights | sha256 `{weights}` |
"""

_UNTRAINED = """
No adapter was trained for this task: the original was itself generated from samples of the task. The error below
compares this adapter with the generated one. Measure it on your own text.
"""

CONTEXT_USE = f"""
It comes with a context: example samples of the task to place at the start of every prompt.
Put `{CONTEXT_TEXT_NAME}` before your prompt. For a chat, put the messages of `{CONTEXT_MESSAGES_NAME}` before yours.
If that file is missing, use `{CONTEXT_TEXT_NAME}` as the system message.
An engine with prefix caching processes the context only once.
"""

_MADE_FOR_IT = "The adapter was made for use with this context and is less effective without it.\n"

_HOW = {
    "code": "from the task's stored code",
    "network": "from the task vectors alone; it is a prediction, not a copy of the original adapter",
}


@dataclass(frozen=True)
class Provenance(WithRelativeError):
    """Where a decoded adapter comes from."""

    task: str
    base_model: str
    source: Literal["code", "recalled", "network"]
    generator: str  # digest of the network
    version: int | None  # of the generator; None if it is not known
    squared_error: float | None  # None if it was not measured
    retained_gain: float | None  # as `icm eval` measured it
    seed: int | None
    is_generated: bool
    recognized: str | None = None  # the task whose code the task's vectors brought back
    precision: str | None = None  # of the base model that the gain was measured on
    claim: Claim | None = None  # of the bundle with its code, not measured here

    @property
    def rung(self) -> str:
        """The name of the source in files."""
        return "generate" if self.source == "recalled" else self.source

    @property
    def how(self) -> str:
        """How it was made, in words."""
        if self.source != "recalled":
            return _HOW[self.source]
        if self.recognized is None:
            return _HOW["network"]
        return f"from the stored code of {self.recognized}, the task that its task vectors recognise"

    def metadata(self) -> dict[str, str]:
        """Return the fields for the header of the tensor file."""
        fields = {"icm_task": self.task, "icm_rung": self.rung, "icm_generator": str(self.generator)}
        return fields if self.seed is None else fields | {"icm_seed": str(self.seed)}


def card_text(provenance: Provenance, files: Collection[str] = ()) -> str:
    """Return the card of a decoded adapter with these files next to it."""
    sampled = "" if provenance.seed is None else f" (sampled with seed {provenance.seed})"
    claim = provenance.claim
    return _CARD.format(
        front=front_matter(provenance.base_model),
        task=provenance.task,
        base=quoted(provenance.base_model),
        how=provenance.how + sampled,
        untrained=_UNTRAINED if provenance.is_generated else "",
        context="" if CONTEXT_NAMES.isdisjoint(files) else CONTEXT_USE,
        rung=provenance.source,
        version="unknown" if provenance.version is None else provenance.version,
        generator=provenance.generator,
        error=_figure(provenance.relative_error, None if claim is None else claim.relative_error),
        gain=_figure(provenance.retained_gain, None if claim is None else claim.retained_gain)
        + measured_in([provenance.precision if claim is None else claim.precision]),
    )


def original_card(task: str, base_model: str, weights: str) -> str:
    """Return the card of an original that came without one; `weights` is the digest of its tensor file."""
    return _ORIGINAL_CARD.format(front=front_matter(base_model), task=task, base=quoted(base_model), weights=weights)


def front_matter(base_model: str) -> str:
    """Return the YAML header that the Hugging Face Hub reads."""
    base_model, _ = split_label(base_model)
    fields = {
        "base_model": base_model,
        "library_name": "peft",
        "tags": ["lora", "icm", f"base_model:adapter:{base_model}"],
    }
    # The label is untrusted, so the YAML library does the quoting.
    return yaml.safe_dump(fields, sort_keys=True, allow_unicode=True)


def quoted(label: str) -> str:
    """Make an untrusted label fit between two backticks on one line."""
    return escape(label).replace("`", "'")


def _figure(value: float | None, claimed: float | None) -> str:
    if value is None and claimed is not None:
        return f"{claimed:.4f}, claimed by the imported bundle"
    return "not measured" if value is None else f"{value:.4f}"


_GENERATED_CARD = """\
---
{front}---

# {task}

A LoRA adapter for `{base}`, generated by icm from {counted} of the task. No adapter was trained for this task,
so its quality is unknown. Measure it on your own text before you rely on it.
{description}{context}
| | |
|---|---|
| samples read | {samples} |
| gradient steps after generating | {refined} |
{distilled}{measured}| generator | version {version}, sha256 `{generator}` |
"""


@dataclass(frozen=True)
class GeneratedCard:
    """The card of an adapter that `icm generate` made from samples of a task."""

    task: str
    base_model: str
    generator: Generator
    samples: int
    refined: int
    distilled: int
    description: str | None  # what the user said about the task
    guard: Guard | None = None  # the losses with and without it and its context
    has_context: bool = False
    is_made_for_it: bool = False

    def text(self) -> str:
        """Return the text of the card."""
        described = "" if self.description is None else f"\nDescription by the user: {escape(self.description)}\n"
        return _GENERATED_CARD.format(
            front=front_matter(self.base_model),
            task=self.task,
            base=quoted(self.base_model),
            samples=self.samples,
            counted=counted(self.samples, "sample"),
            description=described,
            context=(CONTEXT_USE if self.has_context else "") + (_MADE_FOR_IT if self.is_made_for_it else ""),
            measured="" if self.guard is None else _measured(self.guard, is_chosen=not self.distilled),
            refined=self.refined,
            distilled=f"| steps of distillation | {self.distilled} |\n" if self.distilled else "",
            version=self.generator.version,
            generator=str(self.generator.blob),
        )

    def metadata(self) -> dict[str, str]:
        """Return the fields for the header of the tensor file."""
        return {"icm_task": self.task, "icm_rung": "generated", "icm_generator": str(self.generator.blob)}


def _measured(guard: Guard, *, is_chosen: bool) -> str:
    """Return the rows of a card with the losses of adapter and context, and a recommendation."""
    served = f"| recommended | {guard.recommended} |\n" if is_chosen else ""
    return f"| nats per token on {guard.measured_on} | {guard.figures} |\n{served}"


_MERGED_CARD = """\
---
{front}---

# {task}

A LoRA adapter for `{base}`, merged by icm from {counted} with PEFT's `add_weighted_adapter` ({how}). It was not
trained, so its quality is unknown. Measure it before you rely on it.

| task | weight | made from | original, sha256 |
|---|--:|---|---|
{parts}
"""


@dataclass(frozen=True)
class MergedPart:
    """One adapter of a merge."""

    task: str
    weight: float  # its factor
    source: Literal["original", "code", "recalled", "network"]  # that was read
    original: str  # digest of the original's weights


@dataclass(frozen=True)
class MergedCard:
    """The card of an adapter that was made of several others."""

    task: str
    base_model: str
    how: str  # the method and its options
    parts: tuple[MergedPart, ...]

    @property
    def source(self) -> str:
        """Its origin in a few words."""
        return f"merged {', '.join(f'{part.weight:.3g} {part.task}' for part in self.parts)} ({self.how})"

    def text(self) -> str:
        """Return the text of the card."""
        rows = (f"| {part.task} | {part.weight:.3g} | {part.source} | `{part.original}` |" for part in self.parts)
        return _MERGED_CARD.format(
            front=front_matter(self.base_model),
            task=self.task,
            base=quoted(self.base_model),
            counted=counted(len(self.parts), "adapter"),
            how=self.how,
            parts="\n".join(rows),
        )

    def metadata(self) -> dict[str, str]:
        """Return the fields for the header of the tensor file."""
        return {"icm_task": self.task, "icm_rung": "merged", "icm_source": self.source}
