"""Run the base model over support sets and use the mean hidden state as the task vector.

    adapted   base + adapter, one state per sample        (samples, d) -> mean -> (d,)
    context   bare base model, one state for all samples              -> (d,)

The base model's modality defines the hidden state. Means are computed in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from icmlora.base_models.modality import BaseModel
from icmlora.base_models.running.attach import adapted
from icmlora.errors import DataError
from icmlora.formats.format import RunnableAdapter
from icmlora.task_vectors.vector import Extractor, Source, TaskVector, VectorSettings, split_samples


def extract_adapted(
    base: BaseModel,
    adapter: RunnableAdapter | Path,
    samples: Sequence[Any] | None,
    settings: VectorSettings | None = None,
    *,
    template: str | None = None,
) -> tuple[TaskVector, ...]:
    """Return the adapted view: one vector per support set."""
    settings = (settings or VectorSettings()).within(base.positions)
    sets = split_samples(base.modality.probes if samples is None else samples, settings)
    with adapted(base, adapter):
        values = [base.modality.states(base, some, settings.sample_tokens).mean(dim=0) for some in sets]
    source: Source = "probes" if samples is None else "samples"
    return _vectors(base, Extractor("adapted", source, settings, base.dtype, base.fingerprint, template), values)


def extract_context(
    base: BaseModel,
    samples: Sequence[Any],
    settings: VectorSettings | None = None,
    *,
    template: str | None = None,
) -> tuple[TaskVector, ...]:
    """Return the context view: one vector per support set, without an adapter."""
    # Samples are required: without an adapter, the bundled probes would give the same vector for every task.
    settings = (settings or VectorSettings()).within(base.positions)
    sets = split_samples(samples, settings)
    values = [base.modality.context_state(base, some, settings.context_tokens) for some in sets]
    return _vectors(base, Extractor("context", "samples", settings, base.dtype, base.fingerprint, template), values)


def _vectors(base: BaseModel, extractor: Extractor, values: Sequence[torch.Tensor]) -> tuple[TaskVector, ...]:
    view, together = extractor.view, torch.stack(list(values)).cpu()
    if not bool(torch.isfinite(together).all()):
        raise DataError(f"the hidden states of the {view} view are not finite", hint="use a higher precision")
    return tuple(TaskVector(view, number, value.clone(), extractor) for number, value in enumerate(together))
