"""The tasks that can be served, from a store or from a bundle alone. Looking for a task imports no torch."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Protocol

from icmlora.adapter.layout import ModuleShape
from icmlora.base_models.finding.lookup import FoundBase, find_base_model
from icmlora.fleet.bundles.bundles import Bundle
from icmlora.fleet.context import Context, find_recorded
from icmlora.fleet.write.materialize import MaterializeRequest, key_of, materialize, plan
from icmlora.formats.format import Template
from registry.files import identity
from registry.filters import Selection
from registry.names import task_name_problem
from registry.records import BaseModelRecord

_ADMITTED = 1
"""Adapters that are decoded at once: more would only take each other's processor."""


@dataclass(frozen=True)
class ServedTask:
    """A task that an engine can ask for.

    Attributes:
        name: Its name, as the store or bundle spells it.
        base_model: The name of its base model.
        key: SHA-256 of everything that its adapter's files follow from.
        layout: Its modules; empty where there can be no code.
    """

    name: str
    base_model: str
    key: str
    layout: tuple[ModuleShape, ...]


@dataclass(frozen=True)
class TaskForm:
    """What an engine is told of a task's adapter.

    Attributes:
        name: The name of the task.
        config: Its `adapter_config.json`, as it is written.
        targets: The names of its modules, as a configuration gives them.
    """

    name: str
    config: bytes
    targets: tuple[str, ...]


@dataclass(frozen=True)
class Stamp:
    """What a file looks like from outside; it differs after a change, up to the steps of the file system's clock.

    Attributes:
        changed: When it was changed last, in seconds since 1970.
        parts: What else tells one state from another.
    """

    changed: float
    parts: tuple[int, ...]

    @classmethod
    def of(cls, path: Path) -> Stamp:
        """Look at a file; one that is absent has a stamp too."""
        try:
            found = path.stat()
        except OSError:
            return cls(0, ())
        return cls(found.st_mtime, (*identity(found), found.st_ctime_ns))


class ServedTasks(Protocol):
    """Where tasks come from. The methods may be called from several threads."""

    def stamp(self) -> Stamp:
        """Return what changes when any task may have changed; microseconds, for each request."""
        ...

    def find(self, name: str) -> ServedTask | None:
        """Return the task that has exactly this name, or None; any text may be asked for."""
        ...

    def names(self, base_model: str | None = None) -> list[str]:
        """Return the names of all tasks, or of those of one base model, sorted."""
        ...

    def forms(self, base_model: str) -> Iterator[TaskForm]:
        """Yield what an engine is told of the tasks of a base model; a row or two is read for each."""
        ...

    def base_models(self) -> Mapping[str, tuple[str, ...]]:
        """Return all names of each base model, by its main name."""
        ...

    def locate(self, base_model: str) -> FoundBase:
        """Find a base model on this machine; raises `BaseModelNotFound`."""
        ...

    def write(self, task: ServedTask, directory: Path) -> None:
        """Write a task's adapter as a folder: complete, or not at all. Raises as `Fleet.materialize` does."""
        ...


class StoreTasks:
    """The tasks of a store: originals as they are, others from their codes."""

    # The store is opened for each call: holding it open would make `icm evict` and `icm prune` wait for the server.

    def __init__(self, context: Context) -> None:
        from registry.storage.folder import StorePaths  # imports SQLAlchemy

        self._context = context
        self._database = StorePaths(context.path).database
        self._admitted = threading.Semaphore(_ADMITTED)

    def stamp(self) -> Stamp:
        """Look at the database file from outside: opening and closing it would drop the locks of other threads."""
        return Stamp.of(self._database)

    def find(self, name: str) -> ServedTask | None:
        """Return the task that has exactly this name, or None."""
        if task_name_problem(name) is not None:
            return None
        found = plan(self._context, name)
        return (
            None
            if found is None or found.task != name
            else ServedTask(found.task, found.base_model, found.key, found.layout)
        )

    def names(self, base_model: str | None = None) -> list[str]:
        """Return the names of all tasks, or of those of one base model, sorted."""
        with self._context.open(read_only=True) as store:
            return store.tasks.names(Selection(base_model=base_model))

    def forms(self, base_model: str) -> Iterator[TaskForm]:
        """Yield what an engine is told of the tasks of a base model."""
        from icmlora.formats.peft.initial import converted_form

        with self._context.open(read_only=True) as store:
            read = cache(store.blobs.read)  # many tasks have the same configuration
            for summary in store.tasks.summaries(Selection(base_model=base_model)):
                final, config = summary.final, read(summary.final.config)
                if final.is_evicted:  # else the original is served as it is
                    layout = tuple(ModuleShape(*entry) for entry in final.layout)
                    config = converted_form(Template(config, layout, final.dtype, final.template)).config
                yield TaskForm(summary.task.name, config, tuple(final.target_modules))

    def base_models(self) -> Mapping[str, tuple[str, ...]]:
        """Return all names of each base model, by its main name."""
        return {record.name: record.names for record in self._records()}

    def locate(self, base_model: str) -> FoundBase:
        """Find a base model on this machine."""
        (record,) = (record for record in self._records() if record.name == base_model)
        return find_recorded(record)

    def write(self, task: ServedTask, directory: Path) -> None:
        """Write a task's adapter as a folder."""
        with self._admitted:
            materialize(self._context, MaterializeRequest(task=task.name, directory=directory))

    def _records(self) -> list[BaseModelRecord]:
        with self._context.open(read_only=True) as store:
            return list(store.base_models.all())


class BundleTasks:
    """The tasks of a bundle file, without a store."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._opened = Stamp.of(path), Bundle(path)
        self._admitted = threading.Semaphore(_ADMITTED)

    def stamp(self) -> Stamp:
        """Look at the file."""
        return Stamp.of(self._path)

    def find(self, name: str) -> ServedTask | None:
        """Return the task that has exactly this name, or None."""
        bundle = self._bundle
        task = bundle.index.task(name)
        if task is None or task.name != name:
            return None
        generator = bundle.generator
        facts = {"generator": [generator.blob, generator.version], "bundled": asdict(task)}
        return ServedTask(task.name, bundle.base_model, key_of(facts), task.layout)

    def names(self, base_model: str | None = None) -> list[str]:
        """Return the names of all tasks, or of those of one base model, sorted."""
        bundle = self._bundle
        return [task.name for task in bundle.tasks] if base_model in (None, bundle.base_model) else []

    def forms(self, base_model: str) -> Iterator[TaskForm]:
        """Yield what an engine is told of the tasks."""
        if base_model == self._bundle.base_model:
            yield from (TaskForm(task.name, config, task.target_modules) for task, config in self._bundle.configs())

    def base_models(self) -> Mapping[str, tuple[str, ...]]:
        """Return the name of the one base model."""
        return {self._bundle.base_model: (self._bundle.base_model,)}

    def locate(self, base_model: str) -> FoundBase:
        """Find the base model on this machine."""
        return find_base_model(base_model)

    def write(self, task: ServedTask, directory: Path) -> None:
        """Write a task's adapter as a folder."""
        with self._admitted:
            self._bundle.materialize(task.name, directory)

    @property
    def _bundle(self) -> Bundle:
        """The bundle; another one once the file was replaced."""
        opened, bundle = self._opened
        if opened != (stamp := self.stamp()):
            bundle = Bundle(self._path)
            self._opened = stamp, bundle
        return bundle


def open_tasks(
    store: str | Path | None, bundle: str | Path | None, *, command: str, lock_timeout: float = 30.0
) -> ServedTasks:
    """Open a bundle if one is named, else a store; a store is read anew with each call.

    Args:
        store: Folder of the store.
        bundle: A bundle file.
        command: Who reads the store, for those who wait for it.
        lock_timeout: Seconds to wait for a command that has the store to itself.
    """
    if bundle is not None:
        return BundleTasks(Path(bundle))
    assert store is not None
    return StoreTasks(Context(Path(store), command=command, lock_timeout=lock_timeout))
