"""The tasks of a store or a bundle that can be served. Looking up a task imports no torch.

    name ──same stamp──▶ cached task
      └───otherwise──▶ store ──same manifest──▶ cached task
                         └────otherwise──────▶ a new task: the sources of its adapter and the key of its files

The store is opened for each lookup and then released, so `icm evict` and `icm prune` do not wait for a server. Blobs
can be read at any time.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from icmlora.adapter.layout import ModuleShape
from icmlora.base_models.finding.lookup import FoundBase
from icmlora.base_models.finding.tensors import needed_tensors
from icmlora.errors import DataError, TaskChanged
from icmlora.fleet.context import Context
from icmlora.fleet.resources.code_source import CodeSource, StoreCodes
from icmlora.fleet.resources.decoding import form_of
from icmlora.fleet.write.materialize import render
from icmlora.fleet.write.sources import ResolvedSource, resolve_source
from icmlora.formats.format import write_adapter_files
from icmlora.serving.store import ServingBundle, ServingStore
from registry.errors import DamagedStore, StoreUnavailable, TaskNotFound
from registry.manifests import Task
from registry.names import Address, address_of, split_version, task_name_problem

if TYPE_CHECKING:
    from icmlora.adapter.model import Adapter
    from icmlora.base_models.finding.tensors import BaseTensors
    from icmlora.fleet.resources.decoding import OriginalForm
    from icmlora.generator.codec.generator_file import GeneratorFile

_DECODERS = 1
"""Adapters decoded at once: more would only compete for the CPU."""
_LOOKUPS = 4
"""Concurrent lookups in the store."""
_MAX_NAMES = 10_000
"""Cached lookups of names, which clients choose and which may be unknown."""
_MAX_DIGITS = 9  # of a version number
_ROUND = 1.0  # seconds between checks whether a slow lookup should stop because the store is unavailable
_PATIENCE = 0.25
"""Seconds that a request for a known task waits for a store that another command has locked."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ServedTask:
    """A version of a task that can be served.

    Attributes:
        name: Its requested name, with `@VERSION` if requested.
        key: SHA-256 of all inputs of its adapter's files.
        source: The source of its adapter, readable without the store.
    """

    name: str
    key: str
    source: ResolvedSource = field(compare=False, repr=False)

    @property
    def base_model(self) -> str:
        """The name of its base model."""
        return self.source.task.base_model

    @property
    def layout(self) -> tuple[ModuleShape, ...]:
        """Its modules; empty if it cannot have a code."""
        return tuple(ModuleShape(*entry) for entry in self.source.task.final.layout)

    @property
    def is_generated(self) -> bool:
        """Whether its adapter was generated from samples, so that its context is used by default."""
        return self.source.task.final.is_generated

    @property
    def is_exact(self) -> bool:
        """Whether the requested name has the case of the task's name."""
        return self.source.task.name == split_version(self.name)[0]

    @property
    def missing(self) -> list[str]:
        """Digests of the blobs that have to be downloaded before its adapter can be written."""
        source, final = self.source, self.source.task.final
        if not isinstance(source.codes, _DetachedParts):
            return []
        needed: list[str | None] = [final.config, *(extra.blob for extra in final.extras)]
        needed += [] if source.code is None else [source.code.blob, source.code.generator]
        needed += [final.weights, final.initial, final.card] if source.source == "original" else []
        return [digest for digest in needed if digest is not None and not source.codes.blobs.is_at_hand(digest)]


class ServedTasks:
    """The tasks of a store or a bundle. Thread-safe; `latest` is for one event loop.

    Args:
        source: The store or the bundle.
        log: Logger for outages. Some engines show only messages below their own logger name.
    """

    def __init__(self, source: ServingStore | ServingBundle, log: logging.Logger = _log) -> None:
        self._source, self._log = source, log
        self.stamp, self.check = source.stamp, source.check
        self._known: OrderedDict[str, tuple[Hashable, ServedTask | None]] = OrderedDict()  # name -> stamp, task
        self._guard, self._decoders = threading.Lock(), threading.Semaphore(_DECODERS)
        # Separate threads, so that lookups that hang in a stopped database do not block writing known tasks.
        self._threads = ThreadPoolExecutor(_LOOKUPS, thread_name_prefix="icm-look")
        self._pending: dict[str, asyncio.Future[ServedTask | None]] = {}
        self._is_logged = False  # that the blob storage is unavailable

    def find(self, name: str) -> ServedTask | None:
        """Return the task with exactly this name or version `NAME@3`, or None; accepts any text."""
        if not can_be_served(name):
            return None
        known, stamp = self._known.get(name), self.stamp()
        task = known[1] if known is not None and known[0] == stamp else self._look(name, stamp)
        return task if task is not None and task.is_exact else None

    async def latest(self, name: str) -> ServedTask | None:
        """Return the same as `find`, without blocking the event loop.

        While another command has the store locked, or its database is unavailable, return the last known version of the
        task. For a task not seen before, raise the errors of reading the store.
        """
        if not can_be_served(name):
            return None
        known = self._known.get(name)
        task = known[1] if known is not None and known[1] is not None and known[1].is_exact else None
        if known is not None and known[0] == self.stamp():
            return task
        if (pending := self._pending.get(name)) is None:
            try:
                self.check()
            except StoreUnavailable:
                if task is None:
                    raise
                return task

            def forget(done: asyncio.Future[ServedTask | None]) -> None:
                del self._pending[name]
                if not done.cancelled():
                    done.exception()  # mark as retrieved; the waiting requests receive it

            loop = asyncio.get_running_loop()
            pending = self._pending[name] = loop.run_in_executor(self._threads, lambda: self.find(name))
            pending.add_done_callback(forget)
        if task is None:
            while not (await asyncio.wait({pending}, timeout=_ROUND))[0]:
                self.check()
            return pending.result()
        try:
            return await asyncio.wait_for(asyncio.shield(pending), _PATIENCE)
        except Exception:  # raised again for requests that need the store
            return task

    def get(self, name: str) -> ServedTask:
        """Return a task by its name in any case; during an outage, its last known version.

        Raises:
            TaskNotFound: There is no such task.
        """
        known, stamp = self._known.get(name), self.stamp(at_once=True)
        task = None if known is None else known[1]
        if known is None or known[0] != stamp:
            try:
                task = self._look(name, stamp)
            except StoreUnavailable:
                if task is None:
                    raise
        if task is None:
            with self.open() as codes:
                return self._served(name, codes, codes.get(name))  # raises, with similar names
        return task

    def _look(self, name: str, stamp: Hashable) -> ServedTask | None:
        """Read a task from the source, ignoring case."""
        with self.open() as codes, self._logging_outages():
            try:
                task = codes.find(name)
            except TaskNotFound:  # no such version
                task = None
            served = None if task is None else self._served(name, codes, task)
        with self._guard:
            self._known[name] = stamp, served
            self._known.move_to_end(name)
            while len(self._known) > _MAX_NAMES:
                self._known.popitem(last=False)
        return served

    def _served(self, name: str, codes: CodeSource, task: Task) -> ServedTask:
        known = self._known.get(name)
        if known is not None and known[1] is not None and known[1].source.task.manifest == task.manifest:
            return known[1]
        source = resolve_source(codes, task)
        if isinstance(codes, StoreCodes):  # a bundle is opened again to read it
            number = None if source.generator is None else codes.version_of(source.generator, task.base_model)
            source = replace(source, codes=_DetachedParts(codes, number, self._source.open))
        return ServedTask(name, key_of(source), source)

    def fetch(self, task: ServedTask) -> None:
        """Download the blobs of a task into the cache.

        Raises:
            StoreUnavailable: Some are not cached, and the blob storage is unavailable.
        """
        parts = task.source.codes
        if not (missing := task.missing):
            return
        assert isinstance(parts, _DetachedParts)
        with self._logging_outages():
            parts.blobs.fetch(missing)
            for digest in missing:  # raises if it is damaged
                parts.read(digest)
        if self._is_logged:
            self._is_logged = False
            self._log.info("icm: the object store is available again")

    @contextmanager
    def open(self) -> Iterator[CodeSource]:
        """Open the store or the bundle; raise `StoreUnavailable` at once if it is known to be unavailable."""
        self.check()
        with self._source.open() as codes:
            yield codes

    def names(self, base_model: str | None = None) -> list[str]:
        """Return the sorted names of all tasks, or of the tasks of one base model."""
        with self.open() as codes:
            return codes.names(base_model)

    def base_models(self) -> Mapping[str, tuple[str, ...]]:
        """Return all names of each base model, by its main name."""
        with self.open() as codes:
            return codes.base_models()

    def locate(self, base_model: str) -> FoundBase:
        """Find a base model on this machine; raise `BaseModelNotFound` if there is none."""
        with self.open() as codes:
            return codes.locate(base_model)

    def write(self, task: ServedTask, directory: Path) -> None:
        """Write a task's adapter as a folder atomically. Raises the errors of `Fleet.materialize`.

        Raises:
            TaskChanged: It has changed since the lookup, so it cannot be written under its key.
        """
        self.fetch(task)  # before the semaphore, so that a slow network blocks no other task
        with self._decoders:
            files = None
            if isinstance(task.source.codes, _DetachedParts):
                with suppress(DamagedStore):  # unreferenced blobs may have been deleted
                    files = render(task.source)
            if files is None:
                with self.open() as codes:
                    source = resolve_source(codes, codes.get(task.name))
                    if key_of(source) != task.key:
                        raise TaskChanged(f"task {task.name!r} is being changed")
                    files = render(source)
            write_adapter_files(directory, task.source.format, files, task.name)

    @contextmanager
    def _logging_outages(self) -> Iterator[None]:
        """Log once that the blob storage is unavailable; `ServingStore` logs outages of the database."""
        try:
            yield
        except StoreUnavailable as error:
            if error.path != self._source.place and not self._is_logged:
                self._is_logged = True
                self._log.warning("icm: %s; still serving tasks whose files are cached here", error.message)
            raise


class _DetachedParts:
    """The sources of one task's adapter, readable without the store; `AdapterParts` describes the methods."""

    better, takes_claims = StoreCodes.better, StoreCodes.takes_claims

    def __init__(
        self, codes: StoreCodes, number: int | None, open_codes: Callable[[], AbstractContextManager[CodeSource]]
    ) -> None:
        self.blobs = codes.store.blobs
        self.read = self.blobs.read
        self._generator, self._number, self._open = codes.generator_cache, number, open_codes

    def version_of(self, generator: str, base_model: str) -> int | None:
        return self._number  # at the time of the lookup

    def generator_file(self, generator: str) -> GeneratorFile:
        return self._generator.get(generator, self.read)

    def form(self, task: Task) -> OriginalForm:
        def of_base() -> BaseTensors:  # only extras that refer to the base model need the store, to locate it
            with self._open() as codes:
                return needed_tensors(lambda: codes.locate(task.base_model))

        return form_of(task.final, self.read, of_base)

    def predict(self, task: Task, seed: int | None) -> Adapter:
        raise DataError("predicted adapters are not served")


def can_be_served(name: str) -> bool:
    """Return whether a text can be the name of a task, or `NAME@VERSION`."""
    task, number = split_version(name)
    if "@" not in name:
        return task_name_problem(task) is None
    number = number or ""
    is_huge = number.isdecimal() and len(number) > _MAX_DIGITS
    return not is_huge and all(task_name_problem(part) is None for part in (task, number))


def key_of(source: ResolvedSource) -> str:
    """Return the SHA-256 of all inputs of an adapter's files, including the version of icm."""
    final, code = source.task.final, source.code
    facts: dict[str, object] = {"icm": _icm_version(), "task": source.task.name, "source": source.source}
    facts |= {"config": final.config, "format": final.format}
    facts["extras"] = [[extra.file, extra.blob] for extra in final.extras]
    if source.generator is None:
        facts["weights"] = final.weights
    else:
        facts |= {"generator": source.generator, "code": None if code is None else code.blob}
        facts |= {"dtype": final.dtype, "template": final.template, "layout": [*map(list, final.layout)]}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


_icm_version = cache(lambda: version("icm-lora"))


def open_tasks(
    store: str | Address | None,
    bundle: str | Path | None,
    *,
    command: str,
    lock_timeout: float = 30.0,
    log: logging.Logger = _log,
) -> ServedTasks:
    """Open a bundle if given, else a store.

    Args:
        store: The store: a folder, or the address of a database.
        bundle: A bundle file.
        command: Name of the reading command, shown to commands that wait for the store.
        lock_timeout: Seconds to wait for a command that has locked the store.
        log: Logger for outages, instead of the module's own.
    """
    if bundle is not None:
        return ServedTasks(ServingBundle(Path(bundle)))
    assert store is not None
    return ServedTasks(ServingStore(Context(address_of(store), command=command, lock_timeout=lock_timeout), log), log)
