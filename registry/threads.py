"""Do the same thing to many files at once, or to none of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")

# fsync waits for the device: more threads than cores keep it busy, and beyond 8 nothing was gained.
_THREADS = 8


def each(call: Callable[[T], R], items: Iterable[T], undo: Callable[[R], object]) -> list[R]:
    """Return what `call` returns for each item, in order, having called it on several at a time.

    If a call raises, those that have not begun never begin, those that were done are undone, and its error goes on.
    """
    with ThreadPoolExecutor(_THREADS) as threads:
        futures = [threads.submit(call, item) for item in items]
        try:
            return [future.result() for future in futures]
        except BaseException:
            threads.shutdown(cancel_futures=True)
            for future in futures:
                if not future.cancelled() and future.exception() is None:
                    undo(future.result())
            raise
