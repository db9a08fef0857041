"""Locks between processes: one for the store, and one for the jobs of each base model.

    store lock   shared while a process uses the store, exclusive while one deletes bytes
    job lock     exclusive while a process trains, updates or evicts for one base model, shared while processes encode
                 tasks of it

**One order.** A process waits for a job lock only while it does not hold the store lock: it releases that, waits, and
acquires it again. A process that waits for the exclusive store lock has released the shared one. So waiting processes
hold at most job locks, and holders of the store lock never wait: no two processes ever wait for each other.

**One deadline.** All waits of a command together take no longer than its `Deadline`, those for the database included.

New readers let a process that just began to wait for the exclusive store lock go first, for at most two seconds: a
busy store would never be without a reader.

A new kind of locks implements `StoreLock`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Protocol

from registry.errors import StoreLocked

POLL_SECONDS = 0.05
NOTIFY_EVERY = 1.0  # seconds
HEAD_START = 2.0  # seconds for which new readers let a waiting exclusive command go first


class StoreLock(Protocol):
    """The locks of one store, as one process has them.

    Each method waits, as long as the command's deadline lasts, and then raises `StoreLocked`.
    """

    def enter(self) -> None:
        """Acquire the shared lock for the first time, after commands that just began to wait for the exclusive one."""
        ...

    def exclusive(self) -> AbstractContextManager[None]:
        """Wait for the exclusive lock, hold it for a block, then go back to the shared one.

        The shared lock is given up while this waits, so nothing read before the block may be trusted inside it.
        """
        ...

    def job(self, base_model: str, *, shared: bool = False) -> AbstractContextManager[None]:
        """Hold the job lock of a base model for a block, alone or shared; a job does not start another one.

        The shared lock of the store is given up while this waits, so nothing read before may be trusted in the block.
        """
        ...

    def close(self) -> None:
        """Release all locks; may be called twice."""
        ...


def in_use(fact: str, deadline: Deadline, path: Path | str) -> StoreLocked:
    """Return the error for a wait that came to its end."""
    hint = f"waited {deadline.seconds:g} s in total; run the command again later, or raise --lock-timeout"
    return StoreLocked(fact, path=path, hint=hint)


class Deadline:
    """How long a command may wait for other processes: the same seconds for all its waits together.

    Args:
        seconds: How long.
        notify: Called once a second during a wait, with its purpose and the holder; may raise to end the wait.
    """

    def __init__(self, seconds: float, notify: Callable[[str], None] = lambda text: None) -> None:
        self.seconds = self.left = seconds
        self._notify = notify

    def wait(self, attempt: Callable[[], bool], whom: Callable[[], str] | None = None) -> bool:
        """Repeat an attempt until it succeeds, and return True; or False once no time is left."""
        if attempt():
            return True
        began = notified = time.monotonic()
        left = self.left
        with self.counted():
            while (now := time.monotonic()) - began < left:
                if whom is not None and now - notified >= NOTIFY_EVERY:
                    self._notify(f"waiting for {whom()}")
                    notified = now
                time.sleep(POLL_SECONDS)
                if attempt():
                    return True
            return False

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Count the seconds of a block that may wait by itself; a moment counts as no wait."""
        began = time.monotonic()
        try:
            yield
        finally:
            spent = time.monotonic() - began
            self.left = max(0.0, self.left - (spent if spent >= POLL_SECONDS else 0.0))
