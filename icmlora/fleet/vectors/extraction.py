"""Run the base model over the samples of tasks, with and without their adapters."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from icmlora.errors import BaseModelNotFound, BaseModelUnsuited
from icmlora.fleet.failures import FAILURES, BaseUnavailable, Failed, as_error
from icmlora.fleet.resources.loading import ModelCache, read_runnable
from icmlora.fleet.resources.texts import read_samples
from icmlora.fleet.resources.workers import OnProgress
from icmlora.task_vectors.extraction import extract_adapted, extract_context
from icmlora.task_vectors.file import vectors_to_bytes
from icmlora.task_vectors.vector import TaskVector, VectorSettings
from registry.manifests import File, Task, Vector, View
from registry.store import Store

VECTOR_DTYPE = torch.bfloat16
"""Precision of the base model, on every device: vectors made in another precision cannot be compared.

bfloat16 is twice as fast as float32 and moves a vector by less than a hundredth of what another support set does.
"""

SAMPLES_READ = VectorSettings().support_sets * VectorSettings().set_size
"""Samples that vectors are made from: `split_samples` chooses the same ones from these as from the whole file."""


@dataclass(frozen=True)
class ExtractedVectors:
    """The vectors of one task, before they are stored."""

    vectors: Sequence[TaskVector]
    source: Literal["samples", "probes"]
    skipped: str | None = None
    note: str | None = None  # printed once for all tasks


def extract_tasks(
    models: ModelCache, tasks: Sequence[Task], on_progress: OnProgress
) -> Iterator[tuple[Task, ExtractedVectors | Failed | BaseUnavailable]]:
    """Extract the vectors of each task of one base model."""
    for task in tasks:
        result: ExtractedVectors | Failed | BaseUnavailable
        try:
            base = models.base(task.base_model, VECTOR_DTYPE)
            samples = read_samples(models.store, task, base, most=SAMPLES_READ)
            items, template = (None, None) if samples is None else (samples.items, samples.template)
            vectors = extract_adapted(base, read_runnable(models.store, task.final), items, template=template)
            if samples is None:
                result = ExtractedVectors(vectors, "probes")
            else:
                vectors += extract_context(base, samples.items, template=template)
                result = ExtractedVectors(vectors, "samples", samples.summary, samples.note)
        except (BaseModelNotFound, BaseModelUnsuited) as error:
            result = BaseUnavailable(error)
        except FAILURES as error:
            result = Failed(as_error(error, models.loaded(task.base_model)))
        yield task, result


def with_vectors(task: Task, new: Sequence[Vector]) -> Task:
    """Return a task with new vectors, which replace its vectors of the same views."""
    views = {vector.view for vector in new}
    return replace(task, vectors=(*(vector for vector in task.vectors if vector.view not in views), *new))


def put_vectors(store: Store, vectors: Sequence[TaskVector]) -> tuple[Vector, ...]:
    """Store the vectors of a task as one blob and return their descriptions."""
    by_view: defaultdict[View, list[torch.Tensor]] = defaultdict(list)
    for vector in vectors:
        by_view[vector.view].append(vector.values)
    data = vectors_to_bytes({view: torch.stack(values) for view, values in by_view.items()})
    blob = File(store.blobs.put(data), len(data))
    return tuple(
        Vector(
            view=vector.view,
            support_set=vector.support_set,
            blob=blob,
            dim=vector.values.numel(),
            extractor=json.loads(vector.extractor.to_json()),
        )
        for vector in vectors
    )
