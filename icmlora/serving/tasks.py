"""The tasks that can be served, from a store or from a bundle alone. Looking for a task imports no torch."""

from __future__ import annotations

import hashlib
import json
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from icmlora.adapter.layout import ModuleShape
from icmlora.base_models.finding.lookup import FoundBase
from icmlora.errors import TaskChanged
from icmlora.fleet.bundles.bundles import Bundle
from icmlora.fleet.context import Context
from icmlora.fleet.resources.code_source import CodeSource, OpenCodes, open_store
from icmlora.fleet.resources.decoding import template_of
from icmlora.fleet.write.materialize import Chosen, choose
from icmlora.formats.format import write_adapter_files
from icmlora.serving.stamp import Stamp
from registry.errors import DamagedStore, RegistryError, TaskNotFound
from registry.names import Address, address_of, split_version, task_name_problem

if TYPE_CHECKING:
    from icmlora.serving.watched import WatchedStore

_ADMITTED = 1
"""Adapters that are decoded at once: more would only take each other's processor."""


@dataclass(frozen=True)
class ServedTask:
    """A task that an engine can ask for.

    Attributes:
        name: Its name, as the store or bundle spells it, with `@VERSION` if one was asked for.
        base_model: The name of its base model.
        key: SHA-256 of everything that its adapter's files follow from.
        layout: Its modules; empty where there can be no code.
        is_generated: Whether its adapter was made from samples, so that its context stands before its requests.
    """

    name: str
    base_model: str
    key: str
    layout: tuple[ModuleShape, ...]
    is_generated: bool = False


@dataclass(frozen=True)
class TaskForm:
    """A task's adapter as an engine sees it.

    Attributes:
        name: The name of the task.
        format: The format of its adapter; engines read `peft`.
        config: Its `adapter_config.json`, as it is written.
        targets: The names of its modules, as a configuration gives them.
        damage: Why the configuration could not be read; `config` is then empty.
    """

    name: str
    format: str
    config: bytes
    targets: tuple[str, ...]
    damage: str | None = None


class ServedTasks:
    """Where tasks come from. The methods may be called from several threads.

    Args:
        stamp: Returns what changes when any task may have changed; it takes microseconds, for each request.
        open_codes: Opens the store or the bundle. It is opened for each call: holding a store open would make
            `icm evict` and `icm prune` wait for the server.
        watched: What keeps the tasks of a store that may be away.
    """

    def __init__(self, stamp: Callable[[], Stamp], open_codes: OpenCodes, watched: WatchedStore | None = None) -> None:
        self.stamp, self._open, self._watched = stamp, open_codes, watched
        self._admitted = threading.Semaphore(_ADMITTED)

    def find(self, name: str) -> ServedTask | None:
        """Return the task that has exactly this name, or a version `NAME@3`, or None; any text may be asked for."""
        if not can_be_served(name):
            return None
        chosen = self._chosen(name)
        if chosen is None or chosen.task.name != split_version(name)[0]:
            return None
        final = chosen.task.final
        layout = tuple(ModuleShape(*entry) for entry in final.layout)
        return ServedTask(name, chosen.task.base_model, key_of(chosen), layout, final.is_generated)

    def check(self) -> None:
        """Raise `StoreUnavailable` if the store is known to be unavailable. Checking again could take many seconds."""
        if self._watched is not None:
            self._watched.check()

    def is_at_hand(self, task: ServedTask) -> bool:
        """Return whether `write` needs no network, according to the cache."""
        return self._watched is None or not self._watched.missing(task.name, task.key)

    def fetch(self, task: ServedTask) -> None:
        """Bring the bytes of a task to this machine."""
        if self._watched is not None:
            self._watched.fetch(self._watched.missing(task.name, task.key))

    def names(self, base_model: str | None = None) -> list[str]:
        """Return the sorted names of all tasks, or of the tasks of one base model."""
        with self._open() as codes:
            return codes.names(base_model)

    def forms(self, base_model: str) -> Iterator[TaskForm]:
        """Yield the form of each task of a base model."""
        from icmlora.formats.peft.initial import converted_form

        with self._open() as codes:
            read = cache(codes.read)  # many tasks have the same configuration
            for task in codes.tasks(base_model):
                final = task.final
                form = TaskForm(task.name, final.format, b"", final.target_modules)
                try:
                    config = read(final.config)
                    if final.is_evicted and final.format == "peft":  # else the original is served as it is
                        config = converted_form(template_of(final, config)).config
                except DamagedStore as error:
                    yield replace(form, damage=error.message)
                else:
                    yield replace(form, config=config)

    def base_models(self) -> Mapping[str, tuple[str, ...]]:
        """Return all names of each base model, by its main name."""
        with self._open() as codes:
            return codes.base_models()

    def locate(self, base_model: str) -> FoundBase:
        """Find a base model on this machine; raises `BaseModelNotFound`."""
        with self._open() as codes:
            return codes.locate(base_model)

    def write(self, task: ServedTask, directory: Path) -> None:
        """Write a task's adapter as a folder: complete, or not at all. Raises as `Fleet.materialize` does.

        Raises:
            TaskChanged: It is not as it was found any more. So what is written is what its key says.
        """
        self.fetch(task)  # whoever waits for a network is not in the way of others
        with self._admitted:
            made = None if self._watched is None else self._watched.files(task.name, task.key)
            if made is None:
                with self._open() as codes:
                    chosen = choose(codes, codes.get(task.name))
                    if key_of(chosen) != task.key:
                        raise TaskChanged(f"task {task.name!r} is being changed")
                    made = chosen.files()
            write_adapter_files(directory, made.format, made.content, task.name)

    def _chosen(self, name: str) -> Chosen | None:
        if self._watched is not None:
            return self._watched.find(name)
        with self._open() as codes:
            return find_chosen(codes, name)


def can_be_served(name: str) -> bool:
    """Return whether a text can be the name of a task, or `NAME@VERSION`."""
    task, version = split_version(name)
    return all(task_name_problem(part) is None for part in (task, *([] if version is None else [version])))


def find_chosen(codes: CodeSource, name: str) -> Chosen | None:
    """Return what the adapter of a task, or of one of its versions, is made from; None if there is none."""
    try:
        task = codes.find(name)
    except TaskNotFound:  # no such version
        return None
    return None if task is None else choose(codes, task)


def key_of(chosen: Chosen) -> str:
    """Return the SHA-256 of all that the weights and the configuration of an adapter follow from, this icm included."""
    final, code = chosen.task.final, chosen.code
    facts: dict[str, object] = {"icm": _icm(), "task": chosen.task.name, "source": chosen.source}
    facts |= {"config": final.config, "format": final.format}
    facts["extras"] = [[extra.file, extra.blob] for extra in final.extras]
    if chosen.generator is None:
        facts["weights"] = final.weights
    else:
        facts |= {"generator": chosen.generator, "code": None if code is None else code.blob}
        facts |= {"dtype": final.dtype, "template": final.template, "layout": [*map(list, final.layout)]}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


@cache
def _icm() -> str:
    return version("icm-lora")


class _ReopenedBundle:
    """Opens a bundle, another one once its file was replaced."""

    def __init__(self, path: Path) -> None:
        self._path, self._opened = path, (Stamp.of(path), Bundle(path))

    def __call__(self) -> AbstractContextManager[CodeSource]:
        opened, bundle = self._opened
        if opened != (stamp := Stamp.of(self._path)):
            bundle = Bundle(self._path)
            self._opened = stamp, bundle
        return bundle.open()


def open_tasks(
    store: str | Address | None,
    bundle: str | Path | None,
    *,
    command: str,
    lock_timeout: float = 30.0,
    log: logging.Logger | None = None,
) -> ServedTasks:
    """Open a bundle if given, else a store. A store is read again at each call.

    Args:
        store: The store: a folder, or the address of a database.
        bundle: A bundle file.
        command: Who reads the store, for those who wait for it.
        lock_timeout: Seconds to wait for a command that has the store to itself.
        log: Logger for outages of the database, instead of the module's own.
    """
    if bundle is not None:
        return ServedTasks(partial(Stamp.of, Path(bundle)), _ReopenedBundle(Path(bundle)))
    assert store is not None
    context = Context(address_of(store), command=command, lock_timeout=lock_timeout)
    if isinstance(context.address, Path):
        from registry.storage.paths import StorePaths  # a bundle needs none of it

        return ServedTasks(partial(Stamp.of, StorePaths(context.address).database), partial(open_store, context))
    watched = watched_store(context, log)
    return ServedTasks(watched.stamp, watched.open, watched)


def watched_store(context: Context, log: logging.Logger | None = None) -> WatchedStore:
    """Return what keeps the tasks of a store in a database.

    Raises:
        RegistryError: The extra for such stores is not installed.
    """
    try:
        from icmlora.serving.watched import WatchedStore
    except ImportError as error:
        hint = "install the extra: pip install 'icm-lora[team]'"
        raise RegistryError(f"a store in PostgreSQL needs an optional package: {error}", hint=hint) from error
    return WatchedStore(context, key_of, log or logging.getLogger(__name__))
