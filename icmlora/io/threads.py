"""Process several parts of an adapter in parallel, each on one thread.

Multi-threaded sums may differ in the last bit. So torch uses one thread per part, and a code has the same bytes for any
number of threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Protocol, TypeVar

import torch

_In = TypeVar("_In")
_Out = TypeVar("_Out")


class Map(Protocol):
    """A `map` over one iterable."""

    def __call__(self, function: Callable[[_In], _Out], items: Iterable[_In]) -> Iterator[_Out]:
        """Call the function for each item; yield results in order."""
        ...


@contextmanager
def one_thread() -> Iterator[None]:
    """Keep torch on the calling thread; also a decorator."""
    # Multi-threaded sums may differ in the last bit, and for parts this small, synchronisation costs more than threads
    # save.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def side_by_side(most: int | None = None) -> Iterator[Map]:
    """Yield a `map` that runs without gradients on torch's number of threads, or at most `most`."""
    before, alone = torch.get_num_threads(), (1,)
    try:
        torch.set_num_threads(1)  # some libraries keep one number for the whole process
        count = min(before, most or before)
        if count == 1:  # starting a thread takes longer than decoding a small adapter
            yield lambda function, items: map(torch.no_grad()(function), items)
            return
        with ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=alone) as threads:
            yield lambda function, items: threads.map(torch.no_grad()(function), items)
    finally:
        torch.set_num_threads(before)


def ahead(items: Iterator[_Out]) -> Iterator[_Out]:
    """Compute the next item on another thread while the caller uses the current item."""
    with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,)) as maker:
        following = maker.submit(next, items, None)
        while (item := following.result()) is not None:
            following = maker.submit(next, items, None)
            yield item
