"""Threads: work on several pieces of an adapter at a time, each of them on one thread.

Sums of several threads may differ in the last bit. So torch stays on one thread within a piece, and a code has the same
bytes whatever the number of threads.
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
    """What `map` does, with one list of arguments."""

    def __call__(self, function: Callable[[_In], _Out], items: Iterable[_In]) -> Iterator[_Out]:
        """Call the function for each item; results come in the items' order."""
        ...


@contextmanager
def one_thread() -> Iterator[None]:
    """Keep torch on the calling thread; also a decorator."""
    # Sums of several threads may differ in the last bit, and for pieces this small waiting for threads costs more than
    # they save.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def side_by_side(most: int | None = None) -> Iterator[Map]:
    """Give a `map` that runs on as many threads as torch has, or at most so many, without gradients."""
    before, alone = torch.get_num_threads(), (1,)
    try:
        torch.set_num_threads(1)  # some libraries have one number for the whole process
        count = min(before, most or before)
        if count == 1:  # a thread takes longer to start than a small adapter takes to decode
            yield lambda function, items: map(torch.no_grad()(function), items)
            return
        with ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=alone) as threads:
            yield lambda function, items: threads.map(torch.no_grad()(function), items)
    finally:
        torch.set_num_threads(before)


def ahead(items: Iterator[_Out]) -> Iterator[_Out]:
    """Make the next item on another thread while the caller uses this one."""
    with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,)) as maker:
        following = maker.submit(next, items, None)
        while (item := following.result()) is not None:
            following = maker.submit(next, items, None)
            yield item
