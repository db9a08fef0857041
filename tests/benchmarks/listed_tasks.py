"""A store of many tasks with all that listings read: codes, task vectors, measurements, and a third of them evicted.

    python -P tests/benchmarks/listed_tasks.py FOLDER TASKS      with PYTHONPATH set to the revision that is to write it

Adapters, codes and vectors are files of their own, as small as possible; only the vectors can be decoded. Each task has
one adapter, one code, two views of four support sets, and three measurements; every tenth has a second version.
"""

from __future__ import annotations

import hashlib
import sys
from dataclasses import replace
from pathlib import Path

import torch

from icmlora.task_vectors.file import vectors_to_bytes
from registry.manifests import Code, File, Generator, Measurement, Source, StoredAdapter, Task, Vector, View
from registry.store import Store

BASE_MODEL = "tiny-llama"
_AT_ONCE, _SETS, _WIDTH, _LAYERS, _RANK = 1_000, 4, 64, 24, 8
_VIEWS: tuple[View, ...] = ("adapted", "context")
_KINDS = ("q_proj", "v_proj")
_EXTRACTOR = {"name": "last-layer", "version": 1, "base": "f00d", "dtype": "float32", "source": "samples"}
_DAY = "2026-01-02T03:04:05Z"


def main(folder: Path, count: int) -> None:
    """Make the store `FOLDER/store`."""
    with Store.open(folder / "store", create=True) as store:
        config, generator = _put(store, b'{"r": 8}'), _put(store, b"generator")
        store.publish([Generator(base_model=BASE_MODEL, blob=generator, config={"quality": 4}, metrics={})])
        for first in range(0, count, _AT_ONCE):
            numbers = range(first, min(first + _AT_ONCE, count))
            weights = [f"weights {number}".encode().ljust(900, b".") for number in numbers]
            codes = [f"code {number}".encode().ljust(300 + number % 200, b".") for number in numbers]
            vectors = list(map(_vectors, numbers))
            store.blobs.put_all([*(data for data, number in zip(weights, numbers, strict=True) if number % 3), *codes])
            store.blobs.put_all(vectors)
            files = zip(numbers, map(_file, weights), map(_file, codes), map(_file, vectors), strict=True)
            tasks = [_task(*own, config, generator) for own in files]
            published = store.publish(tasks)
            store.publish([replace(task, version=2) for task in published[::10]])


def _task(number: int, weights: File, code: File, vectors: File, config: File, generator: File) -> Task:
    name = f"task-{number:06d}"
    layout = tuple((f"model.layers.{layer}.{kind}", _RANK, 64, 64) for layer in range(_LAYERS) for kind in _KINDS)
    measured: dict[Source, float | None] = {"base": None, "original": 1.0, "code": 0.97 - number % 1000 / 5000}
    return Task(
        name=name,
        base_model=BASE_MODEL,
        final=StoredAdapter(
            weights=weights,
            config=config,
            source=f"loras/{name}",
            tensors_key=hashlib.sha256(name.encode()).hexdigest()[:16],
            dtype="BF16",
            rank_max=_RANK,
            parameters=2 * 64 * _RANK * len(layout),
            target_modules=_KINDS,
            layout=layout,
            created_at=_DAY,
            evicted_at=None if number % 3 else _DAY,
        ),
        vectors=tuple(
            Vector(view=view, support_set=place, blob=vectors, dim=_WIDTH, extractor=_EXTRACTOR)
            for view in _VIEWS
            for place in range(_SETS)
        ),
        code=Code(blob=code, generator=generator, squared_error=(0.05 + number % 1000 / 5000) ** 2),
        measured=tuple(
            Measurement(
                source=source,
                generator=str(generator) if source == "code" else None,
                data="ab" * 32,
                value=2.0,
                count=100,
                utf8_bytes=400,
                retained_gain=gain,
                settings={"dtype": "float32", "max_tokens": 256},
            )
            for source, gain in measured.items()
        ),
        tags=() if number % 7 else ("prod", "team/search"),
        pinned=number % 11 == 0 and bool(number % 3),
        created_at=_DAY,
    )


def _put(store: Store, data: bytes) -> File:
    return File(store.blobs.put(data), len(data))


def _file(data: bytes) -> File:
    return File(hashlib.sha256(data).hexdigest(), len(data))


def _vectors(number: int) -> bytes:
    draw = torch.Generator().manual_seed(number)
    own = torch.randn(1, _WIDTH, generator=draw)
    return vectors_to_bytes({view: own + torch.randn(_SETS, _WIDTH, generator=draw) / 3 for view in _VIEWS})


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
