"""The engine as it was seen last: which one it is, what it serves, and which tasks are of its base model."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import httpx

from icmlora.serving.base import EngineBase
from icmlora.serving.gateway.engines import Engine, Listing, connect
from icmlora.serving.requirements import EngineName
from icmlora.serving.stamp import Stamp
from icmlora.serving.tasks import ServedTask, ServedTasks

R = TypeVar("R")


class Connection:
    """The engine behind the gateway. It may be away at the start, and come back as another one.

    Methods that ask it raise `HttpProblem`, as `Engine` does.

    Args:
        client: What the gateway's own requests go through.
        tasks: The tasks that it may be asked for.
        threads: Where base models are compared.
        name: Which engine it is; None to ask it.
        label: The base model of the tasks, if the user says that it is the engine's.
    """

    def __init__(
        self,
        client: httpx.AsyncClient,
        tasks: ServedTasks,
        threads: ThreadPoolExecutor,
        name: EngineName | None = None,
        label: str | None = None,
    ) -> None:
        self._client, self._tasks, self._threads = client, tasks, threads
        self._name, self._label = name, label
        self._engine: Engine | None = None
        self._seen: tuple[float, Listing] | None = None
        self._base: tuple[str, Stamp, EngineBase] | None = None

    async def engine(self) -> Engine:
        """Return the engine; the first time it is asked which one it is."""
        if self._engine is None:
            self._engine = await connect(self._client, self._name)
        return self._engine

    async def listing(self, max_age: float = 0.0) -> Listing:
        """Return what the engine serves, as it said at most `max_age` seconds ago."""
        if self._seen is None or time.monotonic() - self._seen[0] > max_age:
            begun = time.monotonic()
            listing = await (await self.engine()).listing()
            self._seen = begun, listing
        return self._seen[1]

    def lost(self) -> None:
        """Take note that the engine did not answer: whatever comes back is asked anew what it is."""
        self._engine = self._seen = None

    async def problem(self, task: ServedTask) -> str | None:
        """Say why the engine's base model is not that of a task, or return None if it is."""
        stamp = self._tasks.stamp()
        model = (await self.listing(max_age=float("inf"))).model
        found = await self._in_thread(lambda: self._base_of(model).problem(task))
        if found is not None and self._base is not None and self._base[1] != stamp:
            self._base = None  # the user may have told icm since then that the two are the same
            found = await self._in_thread(lambda: self._base_of(model).problem(task))
        return found

    async def names(self) -> list[str]:
        """Return the names of all tasks of the engine's base model."""
        model = (await self.listing(max_age=float("inf"))).model
        return await self._in_thread(lambda: self._names(model))

    async def check_ready(self, max_age: float) -> None:
        """Check that the engine answers, as it did at most `max_age` seconds ago, and that it loads adapters."""
        await self.listing(max_age)
        await (await self.engine()).check_prepared()

    async def prepare(self) -> tuple[str, int, int]:
        """Do what the first task would wait for; return the engine's model, how many tasks are of it, how many not."""
        model = (await self.listing()).model
        await self._in_thread(lambda: self._base_of(model).prepare())
        await self.check_ready(float("inf"))
        served, tasks = await self._in_thread(lambda: (len(self._names(model)), len(self._tasks.names())))
        return model, served, tasks - served

    def _names(self, model: str) -> list[str]:
        base = self._base_of(model)
        return sorted(
            name for label in self._tasks.base_models() if base.is_of(label) for name in self._tasks.names(label)
        )

    def _base_of(self, model: str) -> EngineBase:
        known = self._base
        if known is None or known[0] != model:
            self._base = known = model, self._tasks.stamp(), EngineBase(model, self._tasks, self._label)
        return known[2]

    async def _in_thread(self, work: Callable[[], R]) -> R:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)
