"""Keep a generated task: its code and its vector, and no weights beside them.

folder as written ──encode──▶ code ──┐
its configuration and card ──────────┴──▶ a task without an original, with its code: one transaction ──▶ vector
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from icm_cli.workflows.vectors import store_vectors
from icmlora.arithmetic import truncated
from icmlora.generator.lineage import Lineage
from icmlora.generator.step_search import Encoded
from icmlora.inspection import inspect_adapter
from icmlora.peft_folder import load_adapter
from icmlora.peft_names import CARD_NAME, CONFIG_NAME, WEIGHTS_NAME
from icmlora.task_vector import TaskVector
from registry.arrivals import Arrival, ArrivingTask
from registry.errors import TaskConflict, TaskNotFound
from registry.records import GeneratorRecord, NewAdapter, NewGenerator

if TYPE_CHECKING:
    from registry.store import Store


def check_unknown(store: Store, name: str) -> None:
    """Check that a task can be registered under a name.

    Raises:
        TaskConflict: The store has a task of that name.
    """
    try:
        known = store.task(name)
    except TaskNotFound:
        return
    raise TaskConflict(known.name, choices=None)


def register(
    store: Store,
    lineage: Lineage,
    generator: GeneratorRecord,
    name: str,
    folder: Path,
    vectors: Sequence[TaskVector],
    rank: int,
) -> Encoded:
    """Encode the adapter in a folder and record the task; the folder is what its code stands in for.

    Args:
        store: The open store.
        lineage: The generator's file.
        generator: The current generator.
        name: What the task is called.
        folder: The adapter as it was written.
        vectors: What the base model says of its samples.
        rank: Of the adapter; the folder's may be padded with zeros to a larger one.

    Raises:
        NotCovered: Its rank is above what any epoch of the generator covers.
        TaskConflict: The store has another task of that name by now.
        GeneratorConflict: Another generator is current by now.
    """
    config, weights = (folder / CONFIG_NAME).read_bytes(), (folder / WEIGHTS_NAME).read_bytes()
    adapter = truncated(load_adapter(config, weights, path=folder), rank)
    mean = {"context": torch.stack([vector.values for vector in vectors]).mean(dim=0)}
    code = lineage.codec_for(adapter.layout).encode(adapter, mean)
    card = store.put_blob((folder / CARD_NAME).read_bytes())
    summary = inspect_adapter(config, weights, path=folder)
    original = NewAdapter(
        weights=hashlib.sha256(weights).hexdigest(),
        config=store.put_blob(config),
        card=card,
        step=None,
        is_final=True,
        dtype=summary.dtype,
        rank_max=summary.rank_max,
        parameters=summary.parameters,
        target_modules=summary.target_modules,
        layout=summary.layout,
        source=f"generated {name}",
    )
    task = ArrivingTask(name, original, len(weights), store.put_blob(code.data), code.dw_error)
    present = NewGenerator(generator.base_model, generator.blob, generator.config, generator.metrics)
    store.take_arrival(Arrival(present, generator.version, [task]))
    store_vectors(store, name, vectors)
    return code
