"""Manage the adapters loaded in the engine: their use, and eviction if space runs out.

    absent --written, loaded--> resident --least recently used, idle--> unloaded, then deleted
                                   |
                                   `--its task was replaced--> retired: serves requests in flight, then deleted

Adapters are loaded and unloaded one at a time, under a lock, to keep the engine's list and this one consistent. While a
task waits for the lock, its adapter is already written if there is plenty of space.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar, TypeVarTuple, Unpack

from icmlora.base_models.examples.context import TaskContext
from icmlora.errors import DataError, FoldersUnusable, TaskChanged
from icmlora.formats.peft.peft import CONTEXT_NAMES
from icmlora.io.strict_json import parse_object
from icmlora.io.text import counted, human_size
from icmlora.serving.folders import AdapterFolders, is_adapter_folder
from icmlora.serving.gateway.connection import Connection
from icmlora.serving.gateway.engines import Engine, Listing
from icmlora.serving.gateway.metrics import Metrics
from icmlora.serving.gateway.problems import HttpProblem
from icmlora.serving.requirements import config_problem
from icmlora.serving.tasks import ServedTask
from registry.errors import IcmError, StoreLocked, StoreUnavailable
from registry.files import is_full

_LINGER = 5.0
"""Seconds that an adapter counts as in use after an interrupted request, which the engine may still run."""
_REMEMBERED = 5.0
"""Seconds before a failed task is retried."""
_LASTING = frozenset(
    {"adapter_unavailable", "store_unavailable", "adapter_unsuited", "engine_refused_adapter", "engine_lied"}
)
_FETCHING = 16
"""Concurrent downloads of tasks: several, so that one that hangs does not block the others."""
_FETCH_TIMEOUT = 15.0
"""Seconds that a task waits for its download, which may continue for the next request."""
_PATIENCE = 10.0
"""Seconds that a task waits for room while all adapters are in use."""
_AHEAD = 4
"""Adapters are written ahead of loading only up to 1/4 of the size limit."""
_MAX_ITEM_BYTES = 8  # a float64
_ATTEMPTS = 3  # to write a task that is being replaced

_log = logging.getLogger(__name__)
R = TypeVar("R")
Ts = TypeVarTuple("Ts")


@dataclass(eq=False)
class Resident:
    """One version of a task that is loaded in the engine.

    Attributes:
        task: The name of the task.
        key: The key of this version.
        adapter: The adapter's name in the engine.
        folder: The adapter's folder.
        uses: Number of requests in flight.
        known: Whether the engine has it, according to the last listing.
    """

    task: str
    key: str
    adapter: str
    folder: Path
    uses: int = 0
    known: bool = True

    @cached_property
    def context(self) -> TaskContext | None:
        """The context for its requests, read once from its folder; None if missing or unreadable."""
        paths = [self.folder / name for name in CONTEXT_NAMES]
        try:
            return TaskContext.read({path.name: path.read_bytes() for path in paths if path.is_file()})
        except (DataError, OSError) as error:
            _log.warning("cannot read the context of %s: %s", self.task, error)
            return None


@dataclass(eq=False)
class _Flight:
    """A task that is being loaded, and the number of waiting requests."""

    key: str
    job: asyncio.Task[Resident | None]
    waiting: int = 0
    landed: Resident | None = None


class Residency:
    """The adapters of one engine.

    Args:
        connection: The engine.
        folders: Folders for written adapters.
        metrics: The metrics.
    """

    def __init__(self, connection: Connection, folders: AdapterFolders, metrics: Metrics) -> None:
        self.connection, self._folders, self.metrics = connection, folders, metrics
        self._tasks, self._settings = connection.tasks, connection.settings
        self._fetching = ThreadPoolExecutor(_FETCHING, thread_name_prefix="icm-fetch")
        self._loaded: OrderedDict[str, Resident] = OrderedDict()  # by task, least recently used first
        self._retired: set[Resident] = set()
        self._flights: dict[str, _Flight] = {}
        self._failures: dict[tuple[str, str], tuple[float, HttpProblem]] = {}
        self._jobs: set[asyncio.Task[Any]] = set()
        self._warned: set[str] = set()  # adapters of the plug-in
        self._turn, self._ahead = asyncio.Lock(), asyncio.Lock()
        self._freed = asyncio.Event()  # an adapter is no longer in use

    @asynccontextmanager
    async def using(self, task: ServedTask) -> AsyncIterator[Resident | None]:
        """Load a task and keep it loaded for the block; yield None if the engine has its own adapter of this name.

        Raises:
            HttpProblem: It cannot be written or loaded, or there is no room.
        """
        resident = await self._acquire(task)
        try:
            yield resident
        except BaseException:
            asyncio.get_running_loop().call_later(_LINGER, self._release, resident)
            raise
        self._release(resident)

    def is_own(self, listing: Listing, adapter: str) -> bool:
        """Return whether the engine has an adapter of this name that the gateway did not load."""
        root = listing.adapters.get(adapter)
        is_own = root is not None and Path(root).parent != self._folders.root
        if is_own and root is not None and is_adapter_folder(Path(root)) and adapter not in self._warned:
            self._warned.add(adapter)
            _log.warning(
                "%s was loaded by icm's vLLM plug-in or by a gateway with another --adapters folder, so this gateway "
                "does not update it; restart the engine without ICM_STORE and ICM_BUNDLE",
                adapter,
            )
        return is_own

    async def forgot(self, resident: Resident) -> bool:
        """Check whether the engine has lost an adapter, such as after a restart."""
        async with self._turn:
            await self._reconcile()
        return not resident.known or self._loaded.get(resident.task) is not resident

    async def remove(self, task: str) -> None:
        """Unload the adapter of a removed task, if it is loaded."""
        if task not in self._loaded:  # checked without the lock, because clients may send any name
            return
        async with self._turn:
            if (resident := self._loaded.get(task)) is not None:
                await self._retire(await self.connection.engine(), resident, "the task was removed")

    async def prepare(self) -> None:
        """Detect the engine, and find adapters that it has already loaded."""
        async with self._turn:
            await self._reconcile()
        model, served, others = await self.connection.prepare()
        if served:
            count = counted(served, "task")
            _log.info("the engine runs %s: serving %s; %d for other base models", model, count, others)
        elif others:
            fact = "the engine runs %s, but no task uses this base model, so requests for tasks get status 404; "
            _log.warning(fact + "if this is their base model under another name, set --base-model", model)

    async def close(self) -> None:
        """Stop loading adapters. Loaded adapters stay for the next gateway."""
        for job in self._jobs:
            job.cancel()
        await asyncio.gather(*self._jobs, return_exceptions=True)
        self._fetching.shutdown(wait=False, cancel_futures=True)

    @property
    def _all(self) -> list[Resident]:
        """All versions that the engine may have."""
        return [*self._loaded.values(), *self._retired]

    async def _acquire(self, task: ServedTask) -> Resident | None:
        resident = self._loaded.get(task.name)
        if resident is not None and resident.known and resident.key == task.key:
            self.metrics.hits.inc()
            self._loaded.move_to_end(task.name)
            resident.uses += 1
            return resident
        self.metrics.misses.inc()
        if (flight := self._flights.get(task.name)) is None:
            until, problem = self._failures.get((task.name, task.key), (0.0, None))
            if problem is not None and time.monotonic() < until:
                raise problem.with_traceback(None)  # otherwise the traceback grows with each raise
            if len(self._flights) >= (limit := self._settings.max_waiting):
                message = f"{limit} other tasks are waiting to load; try again soon."
                raise HttpProblem(503, message, "too_many_waiting", retry_after=2)
            flight = self._flights[task.name] = _Flight(task.key, self._start(self._fly(task)))
        flight.waiting += 1
        try:
            return await asyncio.shield(flight.job)
        except asyncio.CancelledError:
            if flight.landed is None:
                flight.waiting -= 1
            else:
                self._release(flight.landed)
            raise

    def _release(self, resident: Resident | None) -> None:
        if resident is None:
            return
        resident.uses -= 1
        if resident.uses == 0:
            self._freed.set()
            if resident in self._retired:
                self._start(self._bury(resident))

    async def _bury(self, resident: Resident) -> None:
        try:
            async with self._turn:
                if resident in self._retired and resident.uses == 0:
                    await self._drop(resident, "another version is loaded")
        except HttpProblem as problem:
            _log.warning("cannot unload %s: %s", resident.task, problem.message)

    async def _fly(self, task: ServedTask) -> Resident | None:
        """Load a task for all requests that wait for it."""
        name, key = task.name, task.key
        try:
            if task.missing:
                await self._fetch(task)
            if self._turn.locked():
                await self._write_ahead(task)
            async with self._turn:
                resident = await self._bring_in(name)
                flight = self._flights[name]
                if resident is not None:  # from now on, each waiting request counts as a use
                    resident.uses += flight.waiting
                    flight.landed = resident
                return resident
        except Exception as error:
            problem = _as_problem(name, error)
            if problem.code in _LASTING:
                now = time.monotonic()
                self._failures = {known: found for known, found in self._failures.items() if found[0] > now}
                self._failures[name, key] = now + _REMEMBERED, problem
            if problem.code != "store_unavailable":  # already logged once
                _log.warning("cannot serve %s: %s", name, problem.message)
            raise problem from None
        finally:
            del self._flights[name]

    async def _fetch(self, task: ServedTask) -> None:
        """Download a task without holding the lock."""
        try:
            async with asyncio.timeout(_FETCH_TIMEOUT):
                await asyncio.get_running_loop().run_in_executor(self._fetching, self._tasks.fetch, task)
        except TimeoutError:
            fact = f"The adapter of {task.name!r} did not download within {_FETCH_TIMEOUT:g} seconds"
            raise HttpProblem(503, f"{fact}; try again soon.", "store_unavailable", retry_after=5) from None

    async def _write_ahead(self, task: ServedTask) -> None:
        """Write a task while the engine loads another one, if there is plenty of space."""
        async with self._ahead:
            folders, layout = self._folders, task.layout
            largest = sum(shape.parameters for shape in layout) * _MAX_ITEM_BYTES
            if layout and folders.size + largest <= folders.limit // _AHEAD and not self._is_full(task):
                with suppress(Exception):  # raised again under the lock
                    await self._in_thread(folders.get, task.key, self._writer(task))

    async def _bring_in(self, name: str) -> Resident | None:
        """Write a task's adapter and load it into the engine."""
        engine, listing = await self.connection.engine(), await self._reconcile()
        if self.is_own(listing, name):
            return None
        task, folder = await self._write(name)
        resident = next((one for one in self._all if (one.task, one.key) == (name, task.key)), None)
        if resident is None:  # otherwise the engine has it, has lost it, or it was retired
            resident = Resident(name, task.key, engine.adapter_name(name, task.key), folder, known=False)
        before = self._loaded.get(name)
        if before is not None and before is not resident:
            await self._retire(engine, before, "another version is loaded")
        if not resident.known:
            data = await self._in_thread((folder / "adapter_config.json").read_bytes)
            config = parse_object(data, what="the configuration", max_bytes=len(data))
            if (problem := config_problem(engine.name, config)) is not None:
                raise HttpProblem(404, f"The engine cannot serve this task: {problem}.", "adapter_unsuited")
            begun = time.monotonic()
            await engine.load(resident.adapter, folder)
            if resident.adapter not in (await self.connection.listing()).adapters:
                fact = "The engine reported that it loaded the adapter, but does not list it."
                raise HttpProblem(502, fact, "engine_lied")
            resident.known, took = True, time.monotonic() - begun
            self.metrics.load_seconds.observe(took)
            size = human_size(self._folders.size_of(resident.key))
            _log.info("loaded %s (%s) into the engine in %.2f s", name, size, took)
        self._retired.discard(resident)
        self._loaded[name] = resident
        self._loaded.move_to_end(name)
        self._measure()
        return resident

    async def _write(self, name: str) -> tuple[ServedTask, Path]:
        """Write the current version of a task."""
        for _ in range(_ATTEMPTS):
            task = await self._tasks.latest(name)
            if task is None:
                raise HttpProblem(404, f"The task {name!r} does not exist.", "model_not_found")
            if (problem := await self.connection.problem(task)) is not None:
                raise HttpProblem(404, f"The engine cannot serve this task: {problem}", "adapter_unsuited")
            with suppress(TaskChanged):
                return task, await self._written(task)
        raise HttpProblem(503, f"The task {name!r} is being changed; try again soon.", "task_changes", retry_after=2)

    async def _written(self, task: ServedTask) -> Path:
        """Return the folder of a task, written if missing."""
        folders = self._folders
        await self._make_room(task, lambda: folders.size >= folders.limit or self._is_full(task))
        while True:
            try:
                folder = await self._in_thread(folders.get, task.key, self._writer(task))
                break
            except OSError as error:  # below the limit, but the disk is full, because other programs use it too
                if not is_full(error):
                    raise
            if not await self._dropped_one(task):
                message = f"There is no disk space left for the adapter of {task.name!r}."
                raise HttpProblem(503, message, "no_room", retry_after=5)
        try:
            await self._make_room(task, lambda: folders.size > folders.limit)
        except HttpProblem:
            await self._discard(task.key)
            raise
        return folder

    def _writer(self, task: ServedTask) -> Callable[[Path], None]:
        """Return a function that writes a task into a folder and records the time taken."""

        def write(directory: Path) -> None:
            with self.metrics.materialize_seconds.time():
                self._tasks.write(task, directory)

        return write

    async def _make_room(self, task: ServedTask, is_needed: Callable[[], bool]) -> None:
        """Unload idle adapters, least recently used first; wait up to `_PATIENCE` if all are in use."""
        until = asyncio.get_running_loop().time() + _PATIENCE
        while is_needed():
            if await self._dropped_one(task):
                continue
            if not any(one.uses for one in self._all):
                limit = human_size(self._folders.limit)
                raise HttpProblem(503, f"The adapter of {task.name!r} exceeds the limit of {limit}.", "no_room")
            self._freed.clear()
            try:
                async with asyncio.timeout_at(until):
                    await self._freed.wait()
            except TimeoutError:
                message = "There is no room for another adapter: all loaded adapters are in use."
                raise HttpProblem(503, message, "no_room", retry_after=1) from None

    async def _dropped_one(self, task: ServedTask) -> bool:
        """Unload the least recently used idle adapter; return whether there was one."""
        others = (one for one in self._loaded.values() if one.task != task.name)
        if (victim := next((one for one in (*self._retired, *others) if one.uses == 0), None)) is not None:
            await self._drop(victim, "least recently used")
        return victim is not None

    def _is_full(self, task: ServedTask) -> bool:
        if self._settings.max_adapters is None:
            return False
        others = sum(one.task != task.name for one in self._loaded.values()) + len(self._retired)
        return others >= self._settings.max_adapters

    async def _retire(self, engine: Engine, resident: Resident, why: str) -> None:
        """Withdraw an adapter from new requests; requests in flight keep it."""
        if engine.unloads_at_once and resident.known:
            await engine.unload(resident.adapter)
            resident.known = False
        del self._loaded[resident.task]
        self._retired.add(resident)
        if resident.uses == 0:
            await self._drop(resident, why)

    async def _drop(self, resident: Resident, why: str) -> None:
        """Unload an idle adapter from the engine, then delete its folder."""
        if was_loaded := self._loaded.get(resident.task) is resident:
            del self._loaded[resident.task]  # before unloading, so that no new request uses it
        try:
            if resident.known:
                await (await self.connection.engine()).unload(resident.adapter)
        except BaseException:
            if was_loaded and resident.task not in self._loaded:
                self._loaded[resident.task] = resident
            raise
        resident.known = False
        self._retired.discard(resident)
        await self._discard(resident.key)
        self.metrics.unloads.inc()
        self._measure()
        _log.info("unloaded %s: %s", resident.task, why)

    async def _discard(self, key: str) -> None:
        """Delete a folder, unless an adapter uses it."""
        if all(one.key != key for one in self._all):
            await self._in_thread(self._folders.discard, key)

    async def _reconcile(self) -> Listing:
        """Update the state from the engine's list, and take over adapters loaded by an earlier gateway."""
        engine, listing = await self.connection.engine(), await self.connection.listing()
        residents = self._all
        for resident in residents:
            if resident.known and listing.adapters.get(resident.adapter) != str(resident.folder):
                resident.known = False
                _log.info("the engine has unloaded %s", resident.task)
        ours = {one.adapter for one in residents if one.known}
        for adapter, root in listing.adapters.items():
            folder, key = Path(root), Path(root).name.removeprefix("sha256-")
            if adapter in ours or folder.parent != self._folders.root:
                continue
            names = (one for one in (adapter, adapter.rpartition("@")[0]) if engine.adapter_name(one, key) == adapter)
            name = next(names, None)
            if name is None or name in self._loaded or not folder.is_dir():
                await engine.unload(adapter)
                continue
            self._loaded[name] = Resident(name, key, adapter, folder)
            self._loaded.move_to_end(name, last=False)
            _log.info("the engine already has %s", name)
        used = {one.key for one in self._all} | {flight.key for flight in self._flights.values()}
        for key in set(self._folders.keys()) - used:
            await self._discard(key)
        for resident in [one for one in self._retired if one.uses == 0]:
            await self._drop(resident, "another version is loaded")
        self._measure()
        return listing

    def _measure(self) -> None:
        self.metrics.loaded.set(sum(one.known for one in self._all))
        self.metrics.bytes.set(self._folders.size)

    def _start(self, work: Coroutine[Any, Any, R]) -> asyncio.Task[R]:
        def end(job: asyncio.Task[R]) -> None:
            self._jobs.discard(job)
            if not job.cancelled():
                job.exception()  # mark as retrieved; waiting requests receive it, and it is in the log

        job = asyncio.create_task(work)
        self._jobs.add(job)
        job.add_done_callback(end)
        return job

    async def _in_thread(self, work: Callable[[Unpack[Ts]], R], *args: *Ts) -> R:
        return await asyncio.get_running_loop().run_in_executor(self.connection.threads, work, *args)


def _as_problem(name: str, error: Exception) -> HttpProblem:
    """Convert an error of loading a task to a problem."""
    if isinstance(error, HttpProblem):
        return error
    if isinstance(error, FoldersUnusable):
        return HttpProblem(503, f"There is no room for another adapter: {error.message}.", "no_room", retry_after=5)
    if isinstance(error, StoreLocked):
        return HttpProblem(503, f"The store is busy: {error.message}.", "store_busy", retry_after=5)
    if isinstance(error, StoreUnavailable):
        return HttpProblem(503, f"The store is unavailable: {error.message}.", "store_unavailable", retry_after=5)
    if isinstance(error, IcmError | OSError):
        reason = error.message if isinstance(error, IcmError) else error.strerror or str(error)
    else:
        _log.exception("unexpected error while loading %s", name, exc_info=error)
        reason = f"unexpected {type(error).__name__}; see the gateway's log for details"
    return HttpProblem(503, f"The adapter of {name!r} could not be written: {reason}", "adapter_unavailable")
