"""How an adapter is generated from samples, and the result."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from registry.manifests import relative_error

if TYPE_CHECKING:
    from icmlora.fewshot.guard import AblationReport
    from icmlora.task_vectors.distances import Familiarity

SAMPLE_TOKENS = 128
"""Tokens read of each sample, here and in the training of the few-shot start."""


MAX_SAMPLES = 64
MAX_CONTEXT_TOKENS = 1536
"""Default maximum length of a context."""


@dataclass(frozen=True)
class Generated:
    """A generated adapter."""

    task: str
    directory: Path
    base_model: str
    generator: str
    samples: int
    reaching: int  # samples that reach the limit of `SAMPLE_TOKENS` tokens, after which nothing is read
    base_nats: float  # loss of the base model on the samples, in nats per token
    nats: float  # loss of the base model with the adapter
    known: Familiarity | None  # how far the task is from known ones; None if too few of them can be compared
    rank: int
    precision: str  # of the base model that read the samples, such as "float32" or "nf4"
    weights: str  # SHA-256 of the written weights
    is_described: bool  # whether the base model wrote the samples itself, from a description
    context_samples: int  # that the context is made of; 0 if there is none, or it is the description
    context_tokens: int
    guard: AblationReport | None  # what adapter and context are worth; None if that was not measured
    code_size: int | None  # bytes of the code that was registered; None without `register`
    code_squared_error: float | None

    @property
    def code_relative_error(self) -> float | None:
        """The relative error of that code."""
        return relative_error(self.code_squared_error)


@dataclass(frozen=True)
class GenerateOptions:
    """The samples and settings of a generation; see `generate`."""

    samples: Path | None
    description: str | None = None
    count: int = MAX_SAMPLES
    refine: int = 0
    distil: int = 0
    rank: int | None = None
    context_tokens: int = MAX_CONTEXT_TOKENS


@dataclass(frozen=True)
class ContextReport:
    """A context that was chosen and stored."""

    task: str
    samples: int  # in the context
    tokens: int
    size: int  # bytes in the store
    guard: AblationReport | None  # the losses with and without it; None if there is only one sample
    precision: str  # of the base model
