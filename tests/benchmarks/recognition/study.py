"""What a condition is worth: how often it names the task, and what codes weigh under a generator conditioned on it.

    adapted       task vector with the task's adapter on: what the paper calls a task vector
    context       task vector of the base model alone: all that a new task has
    description   one line about the task, as the base model's mean hidden state
    label         a one-hot vector: which task it is, and nothing else
    none          no condition

Recognition reads 16 held-out texts of each task. Only the context view can be asked for data whose task is unknown: to
make the adapted view of held-out texts, the adapter of the right task is put on, so that figure is an upper bound.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from icmlora import Fleet
from icmlora.base_models.modality import BaseModel
from icmlora.base_models.reading import examples_for
from icmlora.fleet.context import Context
from icmlora.fleet.ingest.ingest import ingest
from icmlora.fleet.resources.loading import open_base, read_runnable
from icmlora.fleet.resources.stored_vectors import comparable_vectors
from icmlora.fleet.vectors.extraction import VECTOR_DTYPE
from icmlora.task_vectors.distances import cosine_distances, mean_vectors
from icmlora.task_vectors.extraction import extract_adapted, extract_context
from icmlora.task_vectors.file import vectors_to_bytes
from icmlora.task_vectors.recognition import Recognizer
from registry.filters import Selection
from registry.manifests import File, Task, Vector
from registry.store import Store

Vectors = dict[str, NDArray[np.float32]]
CONDITIONS = ("adapted", "context", "description", "label", "none")


@dataclass(frozen=True)
class Conditions:
    """The vectors of a fleet: of each condition as the store knows the tasks, and of their held-out texts."""

    known: dict[str, Vectors]
    held_out: dict[str, Vectors]  # views "adapted" and "context" only


def extract(context: Context, base_model: str, fleet: Path, descriptions: Mapping[str, str]) -> Conditions:
    """Read the vectors of a store's tasks, and make those of their held-out texts and descriptions."""
    with context.open() as store:
        base = open_base(store, base_model, torch.device("cpu"), VECTOR_DTYPE, cache=context.cache)
        tasks = list(store.tasks(Selection(base_model=base_model)))
        known: dict[str, Vectors] = {
            view: comparable_vectors(store, tasks, view).vectors for view in ("adapted", "context")
        }
        held_out: dict[str, Vectors] = {"adapted": {}, "context": {}}
        for task in tasks:
            texts = examples_for(base, (fleet / task.name / "eval.jsonl").read_bytes()).items
            adapter = read_runnable(store, task.final)
            held_out["adapted"][task.name] = _stacked(extract_adapted(base, adapter, texts))
            held_out["context"][task.name] = _stacked(extract_context(base, texts))
    names = list(known["context"])
    known["description"] = {name: _described(base, descriptions[name]) for name in names}
    known["label"] = dict(zip(names, np.eye(len(names), dtype=np.float32)[:, None], strict=True))
    return Conditions(known, held_out)


def recognition(found: Conditions) -> dict[str, Any]:
    """Return for each condition how many tasks are named rightly, and of the views how many are called new."""
    names, rows = list(found.known["context"]), {}
    for view in ("adapted", "context"):
        known, held_out = found.known[view], found.held_out[view]
        recognizer = Recognizer(known)
        right = {name: recognizer.recognize(held_out[name]) for name in names}
        absent = {
            name: Recognizer({other: vectors for other, vectors in known.items() if other != name}) for name in names
        }
        rows[view] = {
            "right": sum(one.task == name for name, one in right.items()),
            "ranked_first": sum(one.candidates[0].task == name for name, one in right.items()),
            "called_new": sum(one.recognize(held_out[name]).task is None for name, one in absent.items()),
            "answers": {name: [one.task, round(one.probability, 3)] for name, one in right.items()},
        }
    # Descriptions and samples are read in the same way, but lie apart as a whole: each is centred on its own mean.
    described = _centred(mean_vectors(found.known["description"]))
    read = _centred(mean_vectors(found.held_out["context"]))
    nearest = cosine_distances(read, described).argmin(axis=1)
    rows["description"] = {"right": int((nearest == np.arange(len(names))).sum())}
    # Samples say nothing of a label: this is the expected number under a guess.
    rows |= {name: {"right": 1} for name in ("label", "none")}
    return {"tasks": len(names), "conditions": rows}


def bits(
    context: Context, base_model: str, base: Path, fleet: Path, vectors: Vectors | None, steps: int
) -> dict[str, float]:
    """Train a generator on a fleet under a condition, in a new store, and return the size of codes and generator.

    Seed, steps and the error that codes may have are the same for every condition.
    """
    ingest(context, sorted(path.parent for path in fleet.glob("*/adapter_config.json")), vectors=False)
    store_fleet = Fleet(context.path, cache=context.cache)
    store_fleet.add_base_model(base_model, base)
    if vectors is not None:
        with context.open() as store:
            _put(store, vectors)
    store_fleet.train(device="cpu", steps=steps, refine=0, evaluate=False)
    (bill,) = store_fleet.stats().fleets
    rows = [task.row for task in bill.tasks]
    size = sum(row.code_size or 0 for row in rows)
    return {
        "code_bytes": size,
        "bits_per_parameter": round(8 * size / sum(row.parameters for row in rows), 5),
        "mean_squared_error": round(float(np.mean([row.squared_error or 0.0 for row in rows])), 5),
        "generator_bytes": bill.generator_size,
    }


def _put(store: Store, vectors: Vectors) -> None:
    """Record vectors as context vectors: training leaves out the adapted view half of the time, and never this one."""
    extractor, tasks = {"name": "study", "view": "context"}, list[Task]()
    for task in store.named(list(vectors)):
        data = vectors_to_bytes({"context": torch.from_numpy(vectors[task.name])})
        blob, (count, dim) = File(store.blobs.put(data), len(data)), vectors[task.name].shape
        vector = Vector(view="context", support_set=0, blob=blob, dim=dim, extractor=extractor)
        tasks.append(replace(task, vectors=tuple(replace(vector, support_set=number) for number in range(count))))
    store.publish(tasks)


def _described(base: BaseModel, text: str) -> NDArray[np.float32]:
    """Return the base model's mean hidden state over a description, (1, d)."""
    (example,) = examples_for(base, json.dumps({"text": text}).encode()).items
    return _stacked(extract_context(base, [example]))


def _stacked(vectors: Sequence[Any]) -> NDArray[np.float32]:
    stacked: NDArray[np.float32] = np.stack([vector.values.numpy() for vector in vectors])
    return stacked


def _centred(vectors: NDArray[np.float64]) -> NDArray[np.float64]:
    centred: NDArray[np.float64] = vectors - vectors.mean(axis=0)
    return centred
