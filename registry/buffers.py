"""Memory that many files pass through, one after the other.

Fresh memory is dear: the kernel clears each page of it when it is first touched, which for a megabyte takes about as
long as hashing it. So what one file is done with is lent to the next.
"""

from __future__ import annotations

import mmap
from bisect import insort
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Condition


class Buffers:
    """Lends memory to several threads, within one bound for what is lent and what waits to be lent again.

    The system gets it back when the object and all views are gone.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._lent = 0
        self._idle: list[mmap.mmap] = []  # by size
        self._changed = Condition()

    @contextmanager
    def lend(self, size: int) -> Iterator[memoryview]:
        """Lend `size` bytes that begin on a page, for the block; wait while other threads hold too many.

        What is in them is left from other files, and will be overwritten by others after the block. More than the
        whole bound is lent alone.
        """
        memory = self._take(size)
        try:
            yield memoryview(memory)[:size]
        finally:
            self._take_back(memory)

    def _take(self, size: int) -> mmap.mmap:
        wanted = max(1, size)  # nothing at all cannot be mapped
        with self._changed:
            self._changed.wait_for(lambda: not self._lent or self._lent + wanted <= self._limit)
            memory = self._idle.pop() if self._idle else None
            if memory is None or len(memory) < wanted:
                while self._idle and not self._has_room(wanted):
                    del self._idle[0]
                # Shared with nobody, but unlike private memory safe to write from while another thread forks.
                memory = mmap.mmap(-1, wanted)
            self._lent += len(memory)
        return memory

    def _take_back(self, memory: mmap.mmap) -> None:
        with self._changed:
            self._lent -= len(memory)
            if self._has_room(len(memory)):
                insort(self._idle, memory, key=len)
            self._changed.notify_all()

    def _has_room(self, size: int) -> bool:
        return self._lent + sum(map(len, self._idle)) + size <= self._limit
