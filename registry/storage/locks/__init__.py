"""Locks between processes: one for the store, and one for the jobs of each base model.

    store lock   shared while a process uses the store, exclusive while it deletes bytes
    job lock     exclusive while a process trains, updates or evicts for one base model, shared while processes encode
                 tasks of it

**One order.** A process releases the store lock while it waits for a job lock, then acquires it again. It also releases
the shared store lock while it waits for the exclusive one. So waiting processes hold job locks at most, and holders of
the store lock never wait: there is no deadlock.

**One deadline.** All waits of a command together take no longer than its `Patience`, including waits for the database.

New readers let a process that has just begun to wait for the exclusive store lock go first, for two seconds at most: a
busy store is never without readers.

A new kind of lock implements `StoreLock`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Protocol

from registry.errors import StoreLocked

POLL_SECONDS = 0.05
TOLD_EVERY = 1.0  # seconds
HEAD_START = 2.0  # seconds during which new readers let a process that waits for the exclusive lock go first


class StoreLock(Protocol):
    """The locks of one store in one process.

    Each method waits as long as the command's patience lasts, then raises `StoreLocked`.
    """

    def enter(self) -> None:
        """Acquire the shared lock for the first time; a new waiter for the exclusive lock goes first."""
        ...

    def exclusive(self) -> AbstractContextManager[None]:
        """Wait for the exclusive lock, hold it for a block, then go back to the shared one.

        The shared lock is released while this waits, so nothing read before the block may be trusted inside it.
        """
        ...

    def job(self, base_model: str, *, shared: bool = False) -> AbstractContextManager[None]:
        """Hold the job lock of a base model for a block, exclusive or shared; not reentrant.

        The shared store lock is released while this waits, so nothing read before may be trusted in the block.
        """
        ...

    def close(self) -> None:
        """Release all locks; idempotent."""
        ...


def in_use(fact: str, patience: Patience, path: Path | str) -> StoreLocked:
    """Return the error for a wait that timed out."""
    hint = f"waited {patience.seconds:g} s in total; run the command again later, or raise --lock-timeout"
    return StoreLocked(fact, path=path, hint=hint)


class Patience:
    """The time that a command may wait for other processes, shared by all its waits.

    Args:
        seconds: The total.
        tell: Called once a second during a wait, with the lock and its holders; may raise to end the wait.
    """

    def __init__(self, seconds: float, tell: Callable[[str], None] = lambda text: None) -> None:
        self.seconds = self.left = seconds
        self._tell = tell

    def wait(self, attempt: Callable[[], bool], whom: Callable[[], str] | None = None) -> bool:
        """Retry an attempt until it succeeds and return True; return False once no time is left."""
        if attempt():
            return True
        began = told = time.monotonic()
        left = self.left
        with self.counted():
            while (now := time.monotonic()) - began < left:
                if whom is not None and now - told >= TOLD_EVERY:
                    self._tell(f"waiting for {whom()}")
                    told = now
                time.sleep(POLL_SECONDS)
                if attempt():
                    return True
            return False

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Count the seconds of a block that waits internally; less than `POLL_SECONDS` is ignored."""
        began = time.monotonic()
        try:
            yield
        finally:
            spent = time.monotonic() - began
            self.left = max(0.0, self.left - (spent if spent >= POLL_SECONDS else 0.0))
