"""Find tasks for requests without reading the store each time.

A lookup in the store takes milliseconds. Its result is valid as long as the stamp of the store stays the same.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

from icmlora.serving.tasks import ServedTask, ServedTasks, can_be_served
from registry.errors import StoreUnavailable

_ROUND = 1.0  # seconds between checks whether a slow lookup should stop because the store is unavailable
_PATIENCE = 0.25
"""Seconds that a request for a known task waits for a store that another command has locked."""


class Catalogue:
    """The tasks that requests may name.

    Args:
        tasks: The tasks of a store or bundle.
        threads: Threads for reading the store.
    """

    def __init__(self, tasks: ServedTasks, threads: ThreadPoolExecutor) -> None:
        self._tasks, self._threads = tasks, threads
        self._pending: dict[str, asyncio.Task[ServedTask | None]] = {}

    async def find(self, name: str) -> ServedTask | None:
        """Return the current task with a name, or None.

        While another command has the store locked, or its database is unavailable, return the last known version of the
        task. For a task not seen before, raise the errors of reading the store.
        """
        if not can_be_served(name):
            return None
        seen = self._tasks.seen(name)
        if seen is not None and seen.stamp == self._tasks.stamp():
            return seen.task
        task = None if seen is None else seen.task
        if (pending := self._pending.get(name)) is None:
            try:
                self._tasks.check()
            except StoreUnavailable:
                if task is None:
                    raise
                return task
            pending = self._pending[name] = asyncio.create_task(self._look(name))
            pending.add_done_callback(lambda done: self._forget(name, done))
        if task is None:
            while not (await asyncio.wait({pending}, timeout=_ROUND))[0]:
                self._tasks.check()
            return pending.result()
        try:
            return await asyncio.wait_for(asyncio.shield(pending), _PATIENCE)
        except Exception:  # raised again for requests that need the store
            return task

    async def _look(self, name: str) -> ServedTask | None:
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._tasks.find, name)

    def _forget(self, name: str, done: asyncio.Task[ServedTask | None]) -> None:
        del self._pending[name]
        if not done.cancelled():
            done.exception()  # mark as retrieved; the waiting requests receive it
