"""Do the same thing to many files at once, or to none of them."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from threading import Semaphore
from typing import TypeVar

from registry import fs

T = TypeVar("T")
R = TypeVar("R")

# Reading and hashing keep a core busy while two more threads wait for the device; yet more get into each other's way.
_WORKERS = min(8, (os.cpu_count() or 1) + 2)
# Syncing waits for the device, which does many syncs at once as fast as one.
_SYNCERS = 12
_OPEN_FILES = 64


class Syncer:
    """Syncs written files in threads of its own, while others are still being written."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(_SYNCERS)
        self._running: list[Future[None]] = []
        self._files: SimpleQueue[tuple[int, Path] | None] = SimpleQueue()
        self._room = Semaphore(_OPEN_FILES)

    def sync(self, fd: int, path: Path) -> None:
        """Begin to sync and close a file; wait while too many are open."""
        self._room.acquire()
        self._files.put((fd, path))
        if len(self._running) < _SYNCERS:
            self._running.append(self._threads.submit(self._sync_all))

    def wait(self) -> None:
        """Wait for all files; no more may be given.

        Raises:
            StoreFull: no space for one of them.
            StoreIOError: one could not be synced.
        """
        self.close()
        for thread in self._running:
            thread.result()

    def close(self) -> None:
        """Wait for all files, whatever became of them."""
        for _ in self._running:
            self._files.put(None)
        self._threads.shutdown()

    def _sync_all(self) -> None:
        failure: BaseException | None = None
        while (file := self._files.get()) is not None:
            try:
                self._sync(*file)
            except BaseException as error:  # it waits until the other files are closed
                failure = error
        if failure is not None:
            raise failure

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
    waiting, done = deque(enumerate(items)), dict[int, R]()

    def work() -> None:
        # One future for a thread: one for each item would cost more than many a call does.
        try:
            while (taken := _take(waiting)) is not None:
                done[taken[0]] = call(taken[1])
        except BaseException:
            waiting.clear()
            raise

    with ThreadPoolExecutor(threads) as pool:
        workers = [pool.submit(work) for _ in range(min(threads, len(waiting)))]
        try:
            for worker in workers:
                worker.result()
        except BaseException:
            waiting.clear()  # the error may be none of a call: the user wants to stop
            pool.shutdown()
            for result in done.values():
                undo(result)
            raise
    return [done[number] for number in sorted(done)]


def _take(waiting: deque[T]) -> T | None:
    """Take the next item, unless another thread took the last one."""
    try:
        return waiting.popleft()
    except IndexError:
        return None


def each_synced(call: Callable[[T, Syncer], R], items: Iterable[T], undo: Callable[[R], object]) -> list[R]:
    """Do what `each` does with calls that give files to a syncer; return once all of these are synced."""
    syncer = Syncer()
    try:
        results = each(lambda item: call(item, syncer), items, undo)
    except BaseException:
        syncer.close()
        raise
    try:
        syncer.wait()
    except BaseException:
        for result in results:
            undo(result)
        raise
    return results


def sync_folders(folders: Iterable[Path]) -> None:
    """Sync folders, many at a time; a sync cannot be undone and need not be."""
    each(fs.fsync_dir, folders, undo=lambda _: None, threads=_SYNCERS)
