"""Promises of a store after any kill: it has all acknowledged results, and a copy of every adapter."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from icmlora.adapter.metrics import squared_error
from icmlora.adapter.model import Adapter
from icmlora.fleet.resources.loading import read_original
from icmlora.generator.codec.generator_file import GeneratorFile
from registry.errors import DamagedStore, TaskNotFound
from registry.manifests import Code
from registry.store import Store
from tests.faults.commands import GONE, MAX_ERROR, TAG

Event = dict[str, Any]


def acknowledges(command: str, event: Event) -> bool:
    """Return whether a command reports with an event that something is done."""
    return "output" in event or _promise(command, event) is not None


def is_kept(command: str, event: Event, store: Store) -> bool:
    """Return whether the store has what an event reports."""
    promise = _promise(command, event)
    try:
        return promise is None or promise(store, event)
    except (DamagedStore, TaskNotFound):
        return False


def has_a_copy(store: Store, name: str) -> bool:
    """Return whether the adapter of a task can be written, byte for byte or from its code."""
    try:
        task = store.task(name)
        if not task.final.is_evicted:
            return store.blobs.read(task.final.weights) != b""
        return task.code is not None and bool(_decoded(store, task.code).modules)
    except DamagedStore:
        return False


def comes_back_within(store: Store, name: str, limit: float) -> bool:
    """Return whether the code of a task decodes to an adapter with the recorded error, within a limit."""
    task = store.task(name)
    if task.code is None or task.code.squared_error is None:
        return False
    error = squared_error(read_original(store, task.final), _decoded(store, task.code))
    return math.sqrt(task.code.squared_error) <= limit and math.isclose(error, task.code.squared_error, rel_tol=0.01)


def _is_generator(store: Store, event: Event) -> bool:
    return event["generator"] in {one.blob for one in store.generators()}


def _is_evicted(store: Store, event: Event) -> bool:
    return store.task(event["task"]).final.is_evicted or event["status"] != "evicted"


def _is_encoded(store: Store, event: Event) -> bool:
    return event["status"] != "encoded" or comes_back_within(store, event["task"], MAX_ERROR)


def _are_imported(store: Store, event: Event) -> bool:
    return _is_generator(store, event) and all(store.task(row["task"]).code is not None for row in event["tasks"])


def _is_registered(store: Store, event: Event) -> bool:
    code = store.task(event["task"]).code
    return code is not None and code.size == event["code_size"]


_PROMISES: dict[str, Callable[[Store, Event], bool]] = {
    "task": lambda store, event: store.task(event["task"]).name == event["task"],
    "evict task": _is_evicted,
    "encode task": _is_encoded,
    "vectors": lambda store, event: len(store.task(event["task"]).vectors) == event["vectors"],
    "trained": _is_generator,
    "updated": _is_generator,
    "import": _are_imported,
    "copy": lambda store, event: set(event["copied"]) <= set(store.names()),
    "generate": _is_registered,
    "edit": lambda store, event: TAG in store.task(GONE).tags,
    "rm": lambda store, event: not set(event["removed"]) & set(store.names()),
}


def _promise(command: str, event: Event) -> Callable[[Store, Event], bool] | None:
    kind = event.get("type", command)  # the document that a command prints at its end has no type
    return _PROMISES.get(f"{command} {kind}", _PROMISES.get(kind))


def _decoded(store: Store, code: Code) -> Adapter:
    data = store.blobs.read(code.blob)
    return GeneratorFile(store.blobs.read(code.generator)).codec_of(data).decode(data)
