"""The tasks of a store or a bundle that can be served. Looking up a task imports no torch.

    name ──same stamp──▶ cached answer
      └───otherwise──▶ store ──▶ digest of its manifest ──▶ known: same parts of the adapter, same key
                                                        └─▶ new: read the parts of its adapter, compute the key

The store is opened for each lookup and then released, so `icm evict` and `icm prune` do not wait for a server. Blobs
can be read at any time.
"""

from __future__ import annotations

import hashlib
import json
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeVar

from icmlora.adapter.layout import ModuleShape
from icmlora.base_models.finding.lookup import FoundBase
from icmlora.errors import DataError, TaskChanged
from icmlora.fleet.bundles.bundles import Bundle
from icmlora.fleet.context import Context
from icmlora.fleet.resources.adapter_row import template_of
from icmlora.fleet.resources.code_source import CodeSource, StoreCodes, open_codes
from icmlora.fleet.resources.decoding import form_of
from icmlora.fleet.write.materialize import render
from icmlora.fleet.write.sources import ResolvedSource, resolve_source
from icmlora.formats.format import AdapterBytes, AdapterFormat, write_adapter_files
from icmlora.serving.watch import StoreWatch, stamp_of
from registry.errors import DamagedStore, StoreUnavailable, TaskNotFound
from registry.manifests import Task
from registry.names import Address, address_of, split_version, task_name_problem

if TYPE_CHECKING:
    from icmlora.adapter.model import Adapter
    from icmlora.base_models.finding.tensors import BaseTensors
    from icmlora.fleet.resources.decoding import OriginalForm
    from icmlora.generator.codec.generator_file import GeneratorFile

_ADMITTED = 1
"""Adapters decoded at once: more would only compete for the CPU."""
_MAX_NAMES = 50_000
"""Cached answers for names, which clients choose and which may be unknown."""
_MAX_ADAPTERS = 10_000
"""Cached manifests with the parts of their adapters."""
_MAX_DIGITS = 9  # of a version number

K = TypeVar("K")
V = TypeVar("V")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ServedTask:
    """A task that can be served.

    Attributes:
        name: Its name, as in the store or bundle, with `@VERSION` if requested.
        base_model: The name of its base model.
        key: SHA-256 of all inputs of its adapter's files.
        layout: Its modules; empty if it cannot have a code.
        is_generated: Whether its adapter was generated from samples, so that its context is used by default.
    """

    name: str
    base_model: str
    key: str
    layout: tuple[ModuleShape, ...]
    is_generated: bool = False


class Answer(NamedTuple):
    """The cached result of a lookup, with the source's stamp at that time."""

    stamp: Hashable
    task: ServedTask | None
    manifest: str | None  # digest


class _Source(Protocol):
    """A source of tasks: a store or a bundle."""

    place: str  # address of the database, or path of the bundle

    def stamp(self, *, at_once: bool = False) -> Hashable:
        """Return a value that changes with any task; takes microseconds."""

    def check(self) -> None:
        """Raise `StoreUnavailable` if the source is known to be unavailable. Opening it could take many seconds."""

    def open(self) -> AbstractContextManager[CodeSource]:
        """Open the store or the bundle for one operation."""


class ServedTasks:
    """The tasks of a store or a bundle. Thread-safe.

    Args:
        source: The store or the bundle.
        log: Logger for outages. Some engines show only messages below their own logger name.
    """

    def __init__(self, source: _Source, log: logging.Logger = _log) -> None:
        self._source, self._log = source, log
        self.stamp, self.check = source.stamp, source.check
        self._answers: OrderedDict[str, Answer] = OrderedDict()
        # Digest of a manifest -> the parts of its adapter.
        self._adapters: OrderedDict[str, ResolvedSource] = OrderedDict()
        self._layouts: dict[Hashable, tuple[ModuleShape, ...]] = {}  # most tasks of a fleet share one layout
        self._guard, self._admitted = threading.Lock(), threading.Semaphore(_ADMITTED)
        self._is_logged = False  # that the blob storage is unavailable

    def seen(self, name: str) -> Answer | None:
        """Return the last answer for a name, valid as long as the stamp stays the same."""
        return self._answers.get(name)

    def find(self, name: str) -> ServedTask | None:
        """Return the task with exactly this name or version `NAME@3`, or None; accepts any text."""
        if not can_be_served(name):
            return None
        stamp, known = self.stamp(), self._answers.get(name)
        return known.task if known is not None and known.stamp == stamp else self._look(name, stamp)[0].task

    def chosen(self, name: str) -> ResolvedSource:
        """Return the current sources of a task's adapter; during an outage, the last known ones.

        Raises:
            TaskNotFound: There is no such task.
        """
        stamp, known = self.stamp(at_once=True), self._answers.get(name)
        kept = None if known is None else self._adapters.get(str(known.manifest))
        if kept is not None and known is not None and known.stamp == stamp:
            return kept
        try:
            found = self._look(name, stamp)[1]
        except StoreUnavailable:
            if kept is None:
                raise
            return kept
        if found is None:
            with self._open() as codes:  # raises, with similar names
                return resolve_source(codes, codes.get(name))
        return found

    def _look(self, name: str, stamp: Hashable) -> tuple[Answer, ResolvedSource | None]:
        """Read a task from the source, ignoring case; only an exact name can be served."""
        with self._open() as codes:
            with self._noticing():
                task = _find(codes, name)
            if task is None:
                return self._answered(name, Answer(stamp, None, None)), None
            digest = str(task.manifest)
            with self._noticing():
                chosen = self._adapters.get(digest) or self._kept(codes, resolve_source(codes, task))
        _keep(self._guard, self._adapters, digest, chosen, _MAX_ADAPTERS)
        served = None
        if task.name == split_version(name)[0]:
            served = ServedTask(name, task.base_model, key_of(chosen), self._layout(task), task.final.is_generated)
        return self._answered(name, Answer(stamp, served, digest)), chosen

    def _answered(self, name: str, answer: Answer) -> Answer:
        _keep(self._guard, self._answers, name, answer, _MAX_NAMES)
        return answer

    def is_at_hand(self, task: ServedTask) -> bool:
        """Return whether `write` needs no network, because all blobs are cached."""
        return not self._missing(task)

    def fetch(self, task: ServedTask) -> None:
        """Download the blobs of a task into the cache.

        Raises:
            StoreUnavailable: Some are not cached, and the blob storage is unavailable.
        """
        missing, chosen = self._missing(task), self._adapter(task)
        if not missing or chosen is None:
            return
        assert isinstance(chosen.codes, _KeptParts)
        with self._noticing():
            chosen.codes.blobs.fetch(missing)
            for digest in missing:  # raises if it is damaged
                chosen.codes.read(digest)
        if self._is_logged:
            self._is_logged = False
            self._log.info("icm: the object store is available again")

    def names(self, base_model: str | None = None) -> list[str]:
        """Return the sorted names of all tasks, or of the tasks of one base model."""
        with self._open() as codes:
            return codes.names(base_model)

    def configs(self, base_model: str) -> Iterator[tuple[Task, bytes | DamagedStore]]:
        """Yield each task of a base model with its `adapter_config.json` as written, or the error of reading it."""
        from icmlora.formats.peft.initial import converted_form

        with self._open() as codes:
            read = cache(codes.read)  # many tasks have the same configuration
            for task in codes.tasks(base_model):
                final = task.final
                try:
                    config = read(final.config)
                    if final.is_evicted and final.format == "peft":  # otherwise the original is served unchanged
                        config = converted_form(template_of(final, config)).config
                except DamagedStore as error:
                    yield task, error
                else:
                    yield task, config

    def base_models(self) -> Mapping[str, tuple[str, ...]]:
        """Return all names of each base model, by its main name."""
        with self._open() as codes:
            return codes.base_models()

    def locate(self, base_model: str) -> FoundBase:
        """Find a base model on this machine; raise `BaseModelNotFound` if there is none."""
        with self._open() as codes:
            return codes.locate(base_model)

    def write(self, task: ServedTask, directory: Path) -> None:
        """Write a task's adapter as a folder atomically. Raises the errors of `Fleet.materialize`.

        Raises:
            TaskChanged: It has changed since the lookup, so it cannot be written under its key.
        """
        self.fetch(task)  # before the semaphore, so that a slow network blocks no other task
        with self._admitted:
            adapter_format, files = self._render(task)
            write_adapter_files(directory, adapter_format, files, task.name)

    def _render(self, task: ServedTask) -> tuple[AdapterFormat, AdapterBytes]:
        if (chosen := self._adapter(task)) is not None and isinstance(chosen.codes, _KeptParts):
            try:
                return chosen.format, render(chosen)
            except DamagedStore:  # unreferenced blobs may have been deleted
                pass
        with self._open() as codes:
            chosen = resolve_source(codes, codes.get(task.name))
            if key_of(chosen) != task.key:
                raise TaskChanged(f"task {task.name!r} is being changed")
            return chosen.format, render(chosen)

    @contextmanager
    def _open(self) -> Iterator[CodeSource]:
        self.check()
        with self._source.open() as codes:
            yield codes

    @contextmanager
    def _noticing(self) -> Iterator[None]:
        """Log once that the blob storage is unavailable; the watch logs outages of the database."""
        try:
            yield
        except StoreUnavailable as error:
            if error.path != self._source.place and not self._is_logged:
                self._is_logged = True
                self._log.warning("icm: %s; still serving tasks whose files are cached here", error.message)
            raise

    def _kept(self, codes: CodeSource, chosen: ResolvedSource) -> ResolvedSource:
        """Detach the parts from the open store; a bundle is opened again to read them."""
        if not isinstance(codes, StoreCodes):
            return chosen
        generator = chosen.generator
        number = None if generator is None else codes.version_of(generator, chosen.task.base_model)
        return replace(chosen, codes=_KeptParts(codes, number, self._source.open))

    def _layout(self, task: Task) -> tuple[ModuleShape, ...]:
        layout = task.final.layout
        if layout not in self._layouts:
            self._layouts[layout] = tuple(ModuleShape(*entry) for entry in layout)
        return self._layouts[layout]

    def _adapter(self, task: ServedTask) -> ResolvedSource | None:
        """Return the cached sources of a task's adapter, or None."""
        known = self._answers.get(task.name)
        if known is None or known.task is None or known.task.key != task.key:
            return None
        return self._adapters.get(str(known.manifest))

    def _missing(self, task: ServedTask) -> list[str]:
        chosen = self._adapter(task)
        if chosen is None or not isinstance(chosen.codes, _KeptParts):
            return []
        final, code = chosen.task.final, chosen.code
        found: list[str] = [final.config, *(extra.blob for extra in final.extras)]
        found += [] if code is None else [code.blob, code.generator]
        if chosen.source == "original":
            found += filter(None, (final.weights, final.initial, final.card))
        return [digest for digest in found if not chosen.codes.blobs.is_at_hand(digest)]


class _KeptParts:
    """The sources of one task's adapter, readable without the store; `AdapterParts` describes the methods."""

    better, takes_claims = StoreCodes.better, StoreCodes.takes_claims

    def __init__(
        self, codes: StoreCodes, version: int | None, reopen: Callable[[], AbstractContextManager[CodeSource]]
    ) -> None:
        self.blobs = codes.store.blobs  # readable while the store is closed
        self.read = self.blobs.read
        self._generator, self._version, self._open = codes.generator_cache, version, reopen

    def version_of(self, generator: str, base_model: str) -> int | None:
        """Return the generator's version at the time of the lookup."""
        return self._version

    def generator_file(self, generator: str) -> GeneratorFile:
        """Open the generator."""
        return self._generator.get(generator, self.read)

    def form(self, task: Task) -> OriginalForm:
        """Read the form; only extras that refer to the base model need the store, to locate it."""
        from icmlora.base_models.finding.tensors import needed_tensors

        def of_base() -> BaseTensors:
            with self._open() as codes:
                return needed_tensors(lambda: codes.locate(task.base_model))

        return form_of(task.final, self.read, of_base)

    def predict(self, task: Task, seed: int | None) -> Adapter:
        """Raise `DataError`: predicted adapters are not served."""
        raise DataError("predicted adapters are not served")


def can_be_served(name: str) -> bool:
    """Return whether a text can be the name of a task, or `NAME@VERSION`."""
    task, version = split_version(name)
    if "@" not in name:
        return task_name_problem(task) is None
    version = version or ""
    is_huge = version.isdecimal() and len(version) > _MAX_DIGITS
    return not is_huge and all(task_name_problem(part) is None for part in (task, version))


def _find(codes: CodeSource, name: str) -> Task | None:
    try:
        return codes.find(name)
    except TaskNotFound:  # no such version
        return None


def _keep(guard: threading.Lock, kept: OrderedDict[K, V], key: K, value: V, most: int) -> None:
    """Add a value to a cache and evict the oldest ones."""
    with guard:
        kept[key] = value
        kept.move_to_end(key)
        while len(kept) > most:
            kept.popitem(last=False)


def key_of(chosen: ResolvedSource) -> str:
    """Return the SHA-256 of all inputs of an adapter's files, including the version of icm."""
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


class _BundleSource:
    """A bundle file, which may be replaced at any time."""

    def __init__(self, path: Path) -> None:
        self.place, self._path, self._opened = str(path), path, (stamp_of(path), Bundle(path))

    def stamp(self, *, at_once: bool = False) -> Hashable:
        """Return the stamp of the file."""
        return stamp_of(self._path)

    def check(self) -> None:
        """Do nothing: a file has no outages."""

    def open(self) -> AbstractContextManager[CodeSource]:
        """Open the current bundle file."""
        opened, bundle = self._opened
        if opened != (stamp := stamp_of(self._path)):
            bundle = Bundle(self._path)
            self._opened = stamp, bundle
        return open_codes(bundle.context)


class _StoreSource(StoreWatch):
    """A store, which is opened for each lookup."""

    def __init__(self, context: Context, log: logging.Logger) -> None:
        super().__init__(context, log)
        self._context = context

    def open(self) -> AbstractContextManager[CodeSource]:
        """Open the store."""
        return open_codes(self._context)


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
        return ServedTasks(_BundleSource(Path(bundle)))
    assert store is not None
    return tasks_of(Context(address_of(store), command=command, lock_timeout=lock_timeout), log)


def tasks_of(context: Context, log: logging.Logger = _log) -> ServedTasks:
    """Return the tasks of a store."""
    return ServedTasks(_StoreSource(context, log), log)
