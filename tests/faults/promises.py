"""What must be in a store, whatever was killed: what a command had acknowledged, and a copy of every adapter."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from icmlora.adapter.metrics import squared_error
from icmlora.adapter.model import Adapter
from icmlora.fleet.resources.loading import read_original
from icmlora.generator.versions import GeneratorFile
from registry.errors import DamagedStore, TaskNotFound
from registry.records import CodeRecord
from registry.store import Store
from tests.faults.commands import GONE, MAX_ERROR, TAG
from tests.icmlora.tiny_base import LABEL

Event = dict[str, Any]


def acknowledges(command: str, event: Event) -> bool:
    """Say whether a command reports with an event that something is done."""
    return "output" in event or _promise(command, event) is not None


def is_kept(command: str, event: Event, store: Store) -> bool:
    """Say whether what an event reports to be in the store is there."""
    promise = _promise(command, event)
    try:
        return promise is None or promise(store, event)
    except (DamagedStore, TaskNotFound):
        return False


def has_a_copy(store: Store, task: str) -> bool:
    """Say whether the adapter of a task can still be written, byte for byte or from its code."""
    final = store.tasks.final(task)
    try:
        if not final.is_evicted:
            return store.blobs.read(final.weights) != b""
        code = _code(store, task)
        return code is not None and bool(_decoded(store, code).modules)
    except DamagedStore:
        return False


def comes_back_within(store: Store, task: str, limit: float) -> bool:
    """Say whether the adapter that its code gives has the error that is recorded, and this keeps a limit."""
    code = _code(store, task)
    if code is None or code.squared_error is None:
        return False
    error = squared_error(read_original(store, store.tasks.final(task)), _decoded(store, code))
    return math.sqrt(code.squared_error) <= limit and math.isclose(error, code.squared_error, rel_tol=0.01)


def _is_known(store: Store, task: str) -> bool:
    return store.tasks.get(task).name == task


def _is_generator(store: Store, event: Event) -> bool:
    return event["generator"] in {record.blob for record in store.generators.all()}


def _is_evicted(store: Store, event: Event) -> bool:
    return _is_known(store, event["task"]) and (
        event["status"] != "evicted" or store.tasks.final(event["task"]).is_evicted
    )


def _is_encoded(store: Store, event: Event) -> bool:
    return event["status"] != "encoded" or comes_back_within(store, event["task"], MAX_ERROR)


def _are_imported(store: Store, event: Event) -> bool:
    return _is_generator(store, event) and all(_code(store, row["task"]) is not None for row in event["tasks"])


def _is_registered(store: Store, event: Event) -> bool:
    code = _code(store, event["task"])
    return code is not None and code.size == event["code_size"]


_PROMISES: dict[str, Callable[[Store, Event], bool]] = {
    "task": lambda store, event: _is_known(store, event["task"]),
    "evict task": _is_evicted,
    "encode task": _is_encoded,
    "vectors": lambda store, event: len(store.vectors.all(event["task"])) == event["vectors"],
    "trained": _is_generator,
    "updated": _is_generator,
    "import": _are_imported,
    "copy": lambda store, event: all(_is_known(store, name) for name in event["copied"]),
    "generate": _is_registered,
    "edit": lambda store, event: TAG in store.tasks.get(GONE).tags,
    "rm": lambda store, event: not set(event["removed"]) & {task.name for task in store.tasks.all()},
}


def _promise(command: str, event: Event) -> Callable[[Store, Event], bool] | None:
    kind = event.get("type", command)  # the document that a command prints at its end has no type
    return _PROMISES.get(f"{command} {kind}", _PROMISES.get(kind))


def _code(store: Store, task: str) -> CodeRecord | None:
    generator = store.generators.current(LABEL)
    return None if generator is None else store.codes.get(task, generator.id)


def _decoded(store: Store, code: CodeRecord) -> Adapter:
    """Decode what the store has of a task besides its original."""
    generator = store.generators.current(LABEL)
    assert generator is not None
    data = store.blobs.read(code.blob)
    return GeneratorFile(store.blobs.read(generator.blob)).codec_of(data).decode(data)
