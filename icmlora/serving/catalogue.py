"""Find tasks for requests without reading the store for each of them.

A lookup in the store takes milliseconds. Its result stays valid while the store's stamp (size and time of the database
file, or the database's change counter) stays the same. File system clocks are coarse, so a result read close to a
change is valid for only a second.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from icmlora.serving.stamp import Stamp
from icmlora.serving.tasks import ServedTask, ServedTasks, can_be_served
from registry.errors import StoreUnavailable

_REMEMBERED = 50_000
"""Names, of tasks or not; clients choose them."""
_STEP = 0.1  # seconds, more than a step of any file system's clock but FAT's
_UNSETTLED = 1.0  # seconds for which a look holds that may have missed a change in its own step
_ROUND = 1.0  # seconds after which a look that takes long is given up if the store is away
_PATIENCE = 0.25
"""Seconds that a request for a task that is known already waits for a store that another command has to itself."""


@dataclass(frozen=True)
class _Look:
    task: ServedTask | None
    stamp: Stamp
    begun: float  # time.time()
    settled: bool


class Catalogue:
    """The tasks that requests may name.

    Args:
        tasks: Where they come from.
        threads: Where the store is read.
    """

    def __init__(self, tasks: ServedTasks, threads: ThreadPoolExecutor) -> None:
        self._tasks, self._threads = tasks, threads
        self._looks: OrderedDict[str, _Look] = OrderedDict()
        self._pending: dict[str, asyncio.Task[ServedTask | None]] = {}

    async def find(self, name: str) -> ServedTask | None:
        """Return the task of a name as it is now, or None.

        While another command has the store to itself, or its database is away, a task is returned as it was seen last.
        Of a task that was not seen yet, this raises what reading the store does.
        """
        if not can_be_served(name):
            return None
        look = self._looks.get(name)
        if look is not None and self._holds(look):
            self._looks.move_to_end(name)
            return look.task
        if (pending := self._pending.get(name)) is None:
            try:
                self._tasks.check()
            except StoreUnavailable:
                if look is None or look.task is None:
                    raise
                return look.task
            pending = self._pending[name] = asyncio.create_task(self._look(name))
            pending.add_done_callback(lambda done: self._forget(name, done))
        if look is None or look.task is None:
            while not (await asyncio.wait({pending}, timeout=_ROUND))[0]:
                self._tasks.check()
            return pending.result()
        try:
            return await asyncio.wait_for(asyncio.shield(pending), _PATIENCE)
        except Exception:  # what is wrong with the store is told to requests that need it
            return look.task

    def _holds(self, look: _Look) -> bool:
        if look.stamp != self._tasks.stamp():
            return False
        return look.settled or time.time() - look.begun < _UNSETTLED

    async def _look(self, name: str) -> ServedTask | None:
        stamp, begun = self._tasks.stamp(), time.time()
        task = await asyncio.get_running_loop().run_in_executor(self._threads, self._tasks.find, name)
        settled = begun - stamp.changed > _STEP
        self._looks[name] = _Look(task, stamp, begun, settled)
        self._looks.move_to_end(name)
        while len(self._looks) > _REMEMBERED:
            self._looks.popitem(last=False)
        return task

    def _forget(self, name: str, done: asyncio.Task[ServedTask | None]) -> None:
        del self._pending[name]
        if not done.cancelled():
            done.exception()  # whoever waits has it; if nobody does, it is no news
