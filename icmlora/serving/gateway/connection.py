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
from icmlora.serving.gateway.settings import GatewaySettings
from icmlora.serving.tasks import ServedTask, ServedTasks

R = TypeVar("R")


class Connection:
    """The gateway's connection to the engine, which may be down at the start or be replaced by another one.

    Methods that call the engine raise `HttpProblem`, as `Engine` does.

    Args:
        client: HTTP client for the gateway's own requests.
        tasks: The tasks to serve.
        threads: Threads for comparing base models and writing adapters.
        settings: Type and base model of the engine, if the user named them, and settings for users of the connection.
    """

    def __init__(
        self, client: httpx.AsyncClient, tasks: ServedTasks, threads: ThreadPoolExecutor, settings: GatewaySettings
    ) -> None:
        self._client, self.tasks, self.threads, self.settings = client, tasks, threads, settings
        self._engine: Engine | None = None
        self._seen: tuple[float, Listing] | None = None
        self._base: tuple[Hashable, EngineBase] | None = None  # with the stamp of the tasks

    async def engine(self) -> Engine:
        """Return the engine. The first call detects its type."""
        if self._engine is None:
            self._engine = await connect(self._client, self.settings.engine)
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
        stamp = self.tasks.stamp()
        found = await self._with_base(lambda base: base.problem(task))
        if found is not None and self._base is not None and self._base[0] != stamp:
            self._base = None  # the user may since have recorded that both are the same model
            found = await self._with_base(lambda base: base.problem(task))
        return found

    async def names(self) -> list[str]:
        """Return the names of all tasks of the engine's base model."""
        return await self._with_base(self._names)

    async def check_ready(self, max_age: float) -> None:
        """Check that the engine responded within the last `max_age` seconds, and that it can load adapters."""
        await self.listing(max_age)
        await (await self.engine()).check_prepared()

    async def prepare(self) -> tuple[str, int, int]:
        """Prepare the engine for the first task; return its model, and how many tasks do and do not use that model."""
        await self.listing()
        await self._with_base(EngineBase.prepare)
        await self.check_ready(float("inf"))
        return await self._with_base(
            lambda base: (base.model, own := len(self._names(base)), len(self.tasks.names()) - own)
        )

    def _names(self, base: EngineBase) -> list[str]:
        labels = filter(base.is_of, self.tasks.base_models())
        return sorted(name for label in labels for name in self.tasks.names(label))

    async def _with_base(self, work: Callable[[EngineBase], R]) -> R:
        """Run a function of the engine's base model in a thread."""
        model = (await self.listing(max_age=float("inf"))).model

        def run() -> R:
            known = self._base
            if known is None or known[1].model != model:
                base = EngineBase(model, self.tasks, self.settings.base_model)
                self._base = known = self.tasks.stamp(), base
            return work(known[1])

        return await asyncio.get_running_loop().run_in_executor(self.threads, run)
