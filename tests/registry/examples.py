"""Small stores and adapters. The registry never looks into the bytes, so any bytes will do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from registry.names import DatabaseUrl
from registry.records import (
    CodeRecord,
    Eviction,
    Extra,
    Json,
    NewAdapter,
    NewCode,
    NewEvaluation,
    NewGenerator,
    NewVector,
    OnConflict,
    TaskIngest,
)
from registry.store import Store
from tests.registry.pairs import pair

BASE = "example/base-model"
LAYOUT = [("layers.0.q_proj", 8, 64, 64), ("layers.0.v_proj", 8, 64, 32)]
EXTRACTOR: Json = {"name": "last-layer", "version": 1, "base": "f00d"}


def new_store(place: Path | DatabaseUrl, *, lock_timeout: float = 5.0) -> Store:
    """Open a store, made if it is absent: at a folder, or what stands for that in this run of pytest."""
    address, blobs = pair.place_of(place) if isinstance(place, Path) else (place, None)
    return Store.open(address, create=True, lock_timeout=lock_timeout, command="test", blobs=blobs)


def offer(
    store: Store,
    name: str,
    *,
    weights: bytes | None = None,
    steps: Sequence[int] = (),
    base_model: str = BASE,
    samples: bytes | None = None,
    eval_data: bytes | None = None,
    card: bytes | None = None,
    on_conflict: OnConflict = "fail",
    base_is_told: bool = False,
    extras: Sequence[Extra] = (),
) -> TaskIngest:
    """Store the bytes of a task with one final adapter and a checkpoint per step; return what is to be recorded."""
    final = adapter(store, weights or f"weights of {name}".encode(), is_final=True, card=card)
    final = replace(final, extras=tuple(extras))
    checkpoints = [adapter(store, f"weights of {name.lower()} at {step}".encode(), step=step) for step in steps]
    return TaskIngest(
        name=name,
        base_model=base_model,
        adapters=[final, *checkpoints],
        samples=None if samples is None else store.blobs.put(samples),
        eval_data=None if eval_data is None else store.blobs.put(eval_data),
        on_conflict=on_conflict,
        base_is_told=base_is_told,
    )


def adapter(
    store: Store, weights: bytes, *, step: int | None = None, is_final: bool = False, card: bytes | None = None
) -> NewAdapter:
    """Store the bytes of one adapter and return what is to be recorded."""
    return NewAdapter(
        weights=store.blobs.put(weights),
        config=store.blobs.put(b'{"r": 8}'),
        card=None if card is None else store.blobs.put(card),
        step=step,
        is_final=is_final,
        dtype="BF16",
        rank_max=8,
        parameters=1792,
        target_modules=["q_proj", "v_proj"],
        layout=LAYOUT,
        source="loras/example",
    )


def ingest(store: Store, name: str, **options: object) -> None:
    """Store and record a task; options as in :func:`offer`."""
    store.tasks.ingest([offer(store, name, **options)])  # type: ignore[arg-type]


def vector(store: Store, task: str, support_set: int = 0, *, data: bytes = b"vector") -> NewVector:
    """Store a task vector's bytes and return what is to be recorded."""
    return NewVector(task, "context", support_set, EXTRACTOR, store.blobs.put(data), dim=64)


def code(store: Store, task: str, *, data: bytes | None = None) -> NewCode:
    """Store a code's bytes and return what is to be recorded."""
    content = data or f"code of {task}".encode()
    blob, bits = store.blobs.put(content), 8.0 * len(content)
    return NewCode(store.tasks.final(task), blob, bits, squared_error=0.01, effect=0.98)


def code_of(store: Store, task: str) -> CodeRecord:
    """Return the code of a task under the current generator."""
    current = store.generators.current(BASE)
    assert current is not None
    found = store.codes.get(task, current.id)
    assert found is not None
    return found


def generator(store: Store, tasks: Sequence[str] = (), *, data: bytes = b"generator", **more: object) -> NewGenerator:
    """Store a generator's bytes with a code for each task and return what is to be recorded."""
    codes = [code(store, task) for task in tasks]
    blob = store.blobs.put(data)
    return NewGenerator(BASE, blob, {"quality": 4}, {"bits": 1.5}, codes=codes, **more)  # type: ignore[arg-type]


def eviction(store: Store, task: str, **more: object) -> Eviction:
    """Return what lets go of all originals of a task whose code stands in for them."""
    current = store.generators.current(BASE)
    assert current is not None
    fields = {
        "adapters": [row.id for row in store.tasks.adapters(task)],
        "final": store.tasks.final(task),
        "code": code_of(store, task),
        "generator": current,
    }
    return Eviction(task, **(fields | {"squared_error": 0.02} | more))  # type: ignore[arg-type]


def evaluation(task: str, *, nats: float = 2.0, generator_id: int | None = None) -> NewEvaluation:
    """Return a measurement of a task's original, or of its code where a generator is given."""
    return NewEvaluation(
        task=task,
        rung="original" if generator_id is None else "code",
        generator_id=generator_id,
        data="ab" * 32,
        value=nats,
        count=100,
        utf8_bytes=400,
        retained_gain=0.97,
        squared_error=None,
        settings={"max_tokens": 256},
    )
