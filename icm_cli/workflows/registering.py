"""Keep a generated task: its code and its vector, and no weights beside them.

adapter ──encode, refine──▶ code ────────┐
written folder ──▶ configuration, card ──┼──▶ a task without an original, with its code and its vectors: one transaction
samples ──base──▶ vectors ───────────────┘
"""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from icm_cli.workflows.code_search import Refiner, refined
from icm_cli.workflows.events import Event, StopFlag
from icm_cli.workflows.vectors import put_vectors
from icmlora.adapter import Adapter
from icmlora.base_model import BaseModel
from icmlora.generator.lineage import Lineage
from icmlora.generator.step_search import Encoded
from icmlora.inspection import inspect_adapter
from icmlora.peft_names import CARD_NAME, CONFIG_NAME, WEIGHTS_NAME
from icmlora.refinement import RefineConfig
from icmlora.task_vector import TaskVector
from registry.arrivals import Arrival, ArrivingTask
from registry.errors import TaskConflict, TaskNotFound
from registry.records import GeneratorRecord, NewAdapter, NewGenerator

if TYPE_CHECKING:
    from registry.store import Store

_TOLERANCE = 0.7
"""A generated adapter does what it does in few directions: finer rounding without refinement is larger and worse."""


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


def code_for(
    lineage: Lineage,
    adapter: Adapter,
    vectors: Sequence[TaskVector],
    base: BaseModel,
    texts: Sequence[str],
    stop: StopFlag,
) -> Generator[Event, None, Encoded | None]:
    """Make the code of a generated adapter, a coarse one that is refined on the samples; None where the user stopped.

    Raises:
        NotCovered: Its rank is above what any epoch of the generator covers.
    """
    codec = lineage.codec_for(adapter.layout)
    mean = {"context": torch.stack([vector.values for vector in vectors]).mean(dim=0)}
    coarse = codec.encode(adapter, mean, tolerance=_TOLERANCE)
    return (yield from refined(codec, adapter, coarse, Refiner(base, texts, RefineConfig()), stop))


def register(
    store: Store,
    generator: GeneratorRecord,
    name: str,
    folder: Path,
    vectors: Sequence[TaskVector],
    code: Encoded,
) -> None:
    """Record the task of a written folder, which is what the code stands in for.

    Args:
        store: The open store.
        generator: The current generator.
        name: What the task is called.
        folder: The adapter as it was written.
        vectors: What the base model says of its samples.
        code: Under that generator.

    Raises:
        TaskConflict: The store has another task of that name by now.
        GeneratorConflict: Another generator is current by now.
    """
    config, weights = (folder / CONFIG_NAME).read_bytes(), (folder / WEIGHTS_NAME).read_bytes()
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
        is_generated=True,
    )
    rows = put_vectors(store, name, vectors)
    blob = store.put_blob(code.data)
    task = ArrivingTask(name, original, len(weights), blob, code.dw_error, vectors=rows)
    present = NewGenerator(generator.base_model, generator.blob, generator.config, generator.metrics)
    store.take_arrival(Arrival(present, generator.version, [task], spare={blob: code.data}.get))
