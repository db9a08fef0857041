"""Small stores and tasks. The registry never looks into the bytes, so any bytes will do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from registry.manifests import Code, File, Generator, Json, Measurement, StoredAdapter, Task, Vector
from registry.names import DatabaseUrl
from registry.store import Store
from tests.registry.pairs import pair

BASE = "example/base-model"
LAYOUT = (("layers.0.q_proj", 8, 64, 64), ("layers.0.v_proj", 8, 64, 32))
EXTRACTOR: Json = {"name": "last-layer", "version": 1, "base": "f00d"}
TEXT = "ab" * 32


def new_store(place: Path | DatabaseUrl, *, lock_timeout: float = 5.0) -> Store:
    """Open a store, creating it if absent: at a folder, or its substitute in this run of pytest."""
    address, blobs = pair.place_of(place) if isinstance(place, Path) else (place, None)
    return Store.open(address, create=True, lock_timeout=lock_timeout, command="test", blobs=blobs)


def put(store: Store, data: bytes) -> File:
    """Store bytes and return the reference to them."""
    return File(store.blobs.put(data), len(data))


def adapter(store: Store, weights: bytes, *, step: int | None = None, **changes: Any) -> StoredAdapter:
    """Store the bytes of one adapter and return it."""
    made = StoredAdapter(
        weights=put(store, weights),
        config=put(store, b'{"r": 8}'),
        step=step,
        dtype="BF16",
        rank_max=8,
        parameters=1792,
        target_modules=("q_proj", "v_proj"),
        layout=LAYOUT,
        source="loras/example" if step is None else f"loras/example/checkpoint-{step}",
    )
    return replace(made, **changes)


def task(store: Store, name: str, *, weights: bytes | None = None, steps: Sequence[int] = (), **changes: Any) -> Task:
    """Store the bytes of a task with a checkpoint per step, and return the task to publish."""
    checkpoints = tuple(adapter(store, f"weights of {name.lower()} at {step}".encode(), step=step) for step in steps)
    final = adapter(store, weights or f"weights of {name}".encode())
    return replace(Task(name=name, base_model=BASE, final=final, checkpoints=checkpoints), **changes)


def ingest(store: Store, name: str, **options: Any) -> Task:
    """Store and publish a task; options as in :func:`task`."""
    return store.publish([task(store, name, **options)])[0]


def vector(store: Store, support_set: int = 0, *, data: bytes = b"vector") -> Vector:
    """Store the bytes of a task vector and return it."""
    return Vector(view="context", support_set=support_set, blob=put(store, data), dim=64, extractor=EXTRACTOR)


def code(store: Store, name: str, *, data: bytes | None = None, generator: bytes = b"generator") -> Code:
    """Store the bytes of a code of a generator and return it."""
    blob = put(store, data or f"code of {name}".encode())
    return Code(blob=blob, generator=put(store, generator), squared_error=0.01, effect=0.98)


def train(store: Store, names: Sequence[str] = (), *, data: bytes = b"generator") -> Generator:
    """Publish the next generator with a code for each task."""
    present = store.generator(BASE)
    made = Generator(
        base_model=BASE,
        version=1 if present is None else present.version + 1,
        blob=put(store, data),
        config={"quality": 4},
        metrics={"bits": 1.5},
        manifest=None if present is None else present.manifest,
    )
    tasks = [replace(store.task(name), code=code(store, name, generator=data)) for name in names]
    published = store.publish([made, *tasks])[0]
    assert isinstance(published, Generator)
    return published


def evict(store: Store, name: str) -> Task:
    """Record the eviction of a task's originals, and free their bytes."""

    def gone(task: Task) -> Task:
        final = replace(task.final, evicted_at="2026-01-02T03:04:05Z")
        checkpoints = tuple(replace(one, evicted_at="2026-01-02T03:04:05Z") for one in task.checkpoints)
        return replace(task, final=final, checkpoints=checkpoints)

    task = store.update(name, gone)
    store.free([file for one in task.adapters for file in one.evictable])
    return task


def measurement(*, nats: float = 2.0, generator: str | None = None) -> Measurement:
    """Return a measurement of the original of a task, or of its code under a generator."""
    return Measurement(
        source="original" if generator is None else "code",
        generator=generator,
        data=TEXT,
        value=nats,
        count=100,
        utf8_bytes=400,
        retained_gain=0.97,
        settings={"max_tokens": 256},
    )
