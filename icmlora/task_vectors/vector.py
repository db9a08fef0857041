"""Task vectors, which condition the generator, and a description of their origin.

    samples --split_samples--> support sets --extract_*--> TaskVector(view, support_set, values)

View "adapted" follows the paper (arXiv 2501.17635): base model plus adapter, last layer, last position, mean over
samples. View "context" needs no adapter: the base model reads the samples as consecutive demonstrations, mean over
positions. Both views of a task use the same support sets. Sets are disjoint, so each describes the task
independently.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal, TypeVar

from icmlora.base_models.examples.examples import spread
from icmlora.errors import DataError

if TYPE_CHECKING:
    import torch

Sample = TypeVar("Sample")
View = Literal["adapted", "context"]
Source = Literal["samples", "probes"]

VERSION = 1  # increment if the same samples give different vectors than before


@dataclass(frozen=True)
class VectorSettings:
    """Amount of text per task vector; the defaults read about 6,000 tokens per task for both views together."""

    support_sets: int = 4  # disjoint sets of samples; each gives one vector per view
    set_size: int = 8  # samples in a set
    sample_tokens: int = 128  # tokens of a sample that the adapted view reads
    # Tokens of all demonstrations in the context view; each sample of the set gets an equal share.
    context_tokens: int = 512

    def __post_init__(self) -> None:
        """Raise `ValueError` if there would be nothing to read."""
        if min(self.support_sets, self.set_size, self.sample_tokens) < 1 or self.context_tokens < self.set_size:
            raise ValueError("task vectors need at least one set of one sample of one token")

    def within(self, positions: int | None) -> VectorSettings:
        """Return the settings for a base model that reads at most `positions` tokens at once."""
        if positions is None:
            return self
        tokens, context = min(self.sample_tokens, positions), min(self.context_tokens, positions)
        return VectorSettings(self.support_sets, min(self.set_size, context), tokens, context)


@dataclass(frozen=True)
class Extractor:
    """The origin of a task vector; vectors from different extractors are not comparable."""

    view: View
    source: Source  # the task's samples or the bundled probes
    settings: VectorSettings
    dtype: str  # precision of the base model
    base: str  # fingerprint of the base model
    template: str | None = None  # digest of the chat template, if chats were read
    version: int = VERSION  # version of the procedure

    def to_json(self) -> str:
        """Return the canonical JSON text; equal extractors have equal text."""
        fields = {"name": "hidden-state", **asdict(self)}
        if self.template is None:  # compatible with versions that did not read chats
            del fields["template"]
        return json.dumps(fields, sort_keys=True, separators=(",", ":"))


@dataclass(frozen=True)
class TaskVector:
    """The vector of one support set of a task."""

    view: View  # "adapted" or "context"
    support_set: int  # number of the support set, from 0
    values: torch.Tensor  # float32, shape (hidden size,)
    extractor: Extractor


def split_samples(samples: Sequence[Sample], settings: VectorSettings | None = None) -> tuple[tuple[Sample, ...], ...]:
    """Choose disjoint support sets from a task's samples; raise `DataError` if there are no samples."""
    # The chosen samples are spread evenly over the file and dealt out in turn, so a file sorted by topic gives similar
    # sets. Fewer samples give fewer sets; less than one full set gives one set of all samples.
    settings = settings or VectorSettings()
    if not samples:
        hint = "run `icm ingest PATH --samples FILE` to add samples to a task"
        raise DataError("a base model of this kind needs samples of the task to extract a task vector", hint=hint)
    sets = max(1, min(settings.support_sets, len(samples) // settings.set_size))
    picked = spread(samples, sets * settings.set_size)
    return tuple(tuple(picked[number::sets]) for number in range(sets))
