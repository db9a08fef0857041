"""The last known state of the engine: its type, its models and the tasks of its base model."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import httpx

from icmlora.serving.base import EngineBase
from icmlora.serving.gateway.engines import Engine, Listing, connect
from icmlora.serving.requirements import EngineName
from icmlora.serving.tasks import ServedTask, ServedTasks

R = TypeVar("R")


class Connection:
    """The gateway's connection to the engine, which may be down at the start or be replaced by another one.

    Methods that call the engine raise `HttpProblem`, as `Engine` does.

    Args:
        client: HTTP client for the gateway's own requests.
        tasks: The tasks to serve.
        threads: Threads for comparing base models.
        name: Type of the engine; None to detect it.
        label: The base model of the engine, if the user named it.
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
        self._base: tuple[str, Hashable, EngineBase] | None = None

    async def engine(self) -> Engine:
        """Return the engine. The first call detects its type."""
        if self._engine is None:
            self._engine = await connect(self._client, self._name)
        return self._engine

    async def listing(self, max_age: float = 0.0) -> Listing:
        """Return the engine's models, at most `max_age` seconds old."""
        if self._seen is None or time.monotonic() - self._seen[0] > max_age:
            begun = time.monotonic()
            listing = await (await self.engine()).listing()
            self._seen = begun, listing
        return self._seen[1]

    def lost(self) -> None:
        """Record that the engine did not respond. Its type and models are requested again."""
        self._engine = self._seen = None

    async def problem(self, task: ServedTask) -> str | None:
        """Return why the engine cannot serve a task, or None if it can."""
        stamp = self._tasks.stamp()
        model = (await self.listing(max_age=float("inf"))).model
        found = await self._in_thread(lambda: self._base_of(model).problem(task))
        if found is not None and self._base is not None and self._base[1] != stamp:
            self._base = None  # the user may since have recorded that both are the same model
            found = await self._in_thread(lambda: self._base_of(model).problem(task))
        return found

    async def names(self) -> list[str]:
        """Return the names of all tasks of the engine's base model."""
        model = (await self.listing(max_age=float("inf"))).model
        return await self._in_thread(lambda: self._names(model))

    async def check_ready(self, max_age: float) -> None:
        """Check that the engine responded within the last `max_age` seconds, and that it can load adapters."""
        await self.listing(max_age)
        await (await self.engine()).check_prepared()

    async def prepare(self) -> tuple[str, int, int]:
        """Prepare the engine for the first task; return its model, and how many tasks do and do not use that model."""
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
