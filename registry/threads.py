"""Do the same thing to many files at once, or to none of them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from pathlib import Path
from threading import Semaphore
from typing import TypeVar

from registry import fs

T = TypeVar("T")
R = TypeVar("R")

# Reading and hashing keep a core busy, and a few more threads wait for the device; yet more get into each other's way.
_WORKERS = min(8, (os.cpu_count() or 1) + 3)
# Syncing waits for the device, which does many syncs at once as fast as one.
_SYNCERS = 16
_OPEN_FILES = 64


class Syncer:
    """Syncs written files in threads of its own, while others are still being written."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(_SYNCERS)
        self._waiting: list[Future[None]] = []
        self._room = Semaphore(_OPEN_FILES)

    def sync(self, fd: int, path: Path) -> None:
        """Begin to sync and close a file; wait while too many are open."""
        self._room.acquire()
        self._waiting.append(self._threads.submit(self._sync, fd, path))

    def wait(self) -> None:
        """Wait for all files.

        Raises:
            StoreFull: no space for one of them.
            StoreIOError: one could not be synced.
        """
        for future in self._waiting:
            future.result()

    def close(self) -> None:
        """Wait for all files, whatever became of them."""
        self._threads.shutdown()

    def _sync(self, fd: int, path: Path) -> None:
        try:
            with fs.store_errors(path.parent):
                fs.sync_and_close(fd)
            fs.failpoint("blob-staged")
        finally:
            self._room.release()


def each(
    call: Callable[[T], R], items: Iterable[T], undo: Callable[[R], object], *, threads: int = _WORKERS
) -> list[R]:
    """Return what `call` returns for each item, in order, having called it on several at a time.

    If a call raises, those that have not begun never begin, those that were done are undone, and its error goes on.
    """
    with ThreadPoolExecutor(threads) as pool:
        futures = [pool.submit(call, item) for item in items]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)  # for all at once: to be woken by each would hold up the others
            return [future.result() for future in futures]
        except BaseException:
            pool.shutdown(cancel_futures=True)
            for future in futures:
                if not future.cancelled() and future.exception() is None:
                    undo(future.result())
            raise


def each_synced(call: Callable[[T, Syncer], R], items: Iterable[T], undo: Callable[[R], object]) -> list[R]:
    """Do what `each` does with calls that give files to a syncer; return once all of these are synced."""
    syncer = Syncer()
    try:
        results = each(lambda item: call(item, syncer), items, undo)
        try:
            syncer.wait()
        except BaseException:
            for result in results:
                undo(result)
            raise
        return results
    finally:
        syncer.close()


def sync_folders(folders: Iterable[Path]) -> None:
    """Sync folders, many at a time; a sync cannot be undone and need not be."""
    each(fs.fsync_dir, folders, undo=lambda _: None, threads=_SYNCERS)
