"""Share many small items of work with a second process. Threads would contend for the GIL.

    parts 0, 2, 4 ...   this process ────────────┐
    parts 1, 3, 5 ...   a copy of it ──results──▶ └─▶ in order

The copy only computes. If it fails or dies, this process computes the missing results.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import chain, islice
from multiprocessing.connection import Connection
from typing import TypeVar

import torch

from icmlora.io.threads import one_thread

_In = TypeVar("_In")
_Out = TypeVar("_Out")


def in_two_processes(function: Callable[[_In], Iterable[_Out]], parts: Sequence[_In]) -> Iterator[_Out]:
    """Yield a function's results for each part, in order; a copy of this process computes every other part.

    Args:
        function: Computes, reads files and opens its own resources. It must hold no open transaction and contact no
            server, because connections do not survive a fork. Its results must be picklable. It may be called twice for
            a part, with the same results.
        parts: Its arguments, one per call.
    """
    # Outside Linux, libraries do not survive a fork.
    if len(parts) < 2 or sys.platform != "linux" or torch.get_num_threads() < 2:
        yield from chain.from_iterable(map(function, parts))
        return
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    copy = context.Process(target=_send_all, args=(function, parts[1::2], sender, receiver), daemon=True)
    copy.start()
    sender.close()
    try:
        with one_thread():  # the copy has the other core
            for number, part in enumerate(parts):
                yield from _received(receiver, function, part) if number % 2 else function(part)
    finally:
        copy.kill()
        copy.join()
        receiver.close()


def _received(receiver: Connection, function: Callable[[_In], Iterable[_Out]], part: _In) -> Iterator[_Out]:
    count = 0
    try:
        while one := receiver.recv():
            yield one[0]
            count += 1
    except (EOFError, OSError):  # the copy is gone
        yield from islice(function(part), count, None)


def _send_all(
    function: Callable[[_In], Iterable[_Out]], parts: Sequence[_In], sender: Connection, receiver: Connection
) -> None:
    """Compute parts in the copy. Errors are dropped: the parent process hits them too."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent kills this process
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    receiver.close()  # otherwise this process would not notice the parent's death
    torch.set_num_threads(1)  # threads do not survive a fork, and OpenMP does not notice
    with suppress(Exception):
        for part in parts:
            for one in function(part):
                sender.send((one,))
            sender.send(())
    os._exit(0)  # skip cleanup: the open resources belong to the parent
