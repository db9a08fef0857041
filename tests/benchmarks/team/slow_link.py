"""A link that is slower than this machine: it passes bytes on, late and at a limited rate, and counts the turns.

A turn is a client that speaks after the server did: a request, or a round trip of a database.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

_CHUNK = 1 << 16


class SlowLink:
    """Listens on a port of this machine, and connects to a server for each client.

    Args:
        connect: Opens a connection to the server.
        delay: Seconds that each turn waits.
        rate: Bytes of answers in a second, of all connections together; 0 for no limit.
    """

    def __init__(self, connect: Callable[[], socket.socket], *, delay: float = 0.0, rate: float = 0.0) -> None:
        self.turns = 0
        self._connect, self._delay, self._rate = connect, delay, rate
        self._lock, self._free_at = threading.Lock(), 0.0
        self._listening = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port = self._listening.getsockname()[1]

    @contextmanager
    def running(self) -> Iterator[SlowLink]:
        """Pass bytes on until the block ends."""
        threading.Thread(target=self._accept, daemon=True).start()
        try:
            yield self
        finally:
            self._listening.close()

    def _accept(self) -> None:
        with suppress(OSError):  # the block has ended
            while True:
                client, _ = self._listening.accept()
                client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                server, has_spoken = self._connect(), threading.Event()
                has_spoken.set()
                for one in ((client, server, self._ask), (server, client, self._answer)):
                    threading.Thread(target=_pass_on, args=(*one, has_spoken), daemon=True).start()

    def _ask(self, size: int, has_spoken: threading.Event) -> None:
        if has_spoken.is_set():  # what follows belongs to the same turn
            has_spoken.clear()
            with self._lock:
                self.turns += 1
            time.sleep(self._delay)

    def _answer(self, size: int, has_spoken: threading.Event) -> None:
        has_spoken.set()
        if self._rate:
            with self._lock:
                now = time.monotonic()
                self._free_at = max(self._free_at, now) + size / self._rate
                wait = self._free_at - now
            time.sleep(wait)


def _pass_on(
    source: socket.socket,
    target: socket.socket,
    before: Callable[[int, threading.Event], None],
    has_spoken: threading.Event,
) -> None:
    with suppress(OSError):
        while data := source.recv(_CHUNK):
            before(len(data), has_spoken)
            target.sendall(data)
    for one in (source, target):
        with suppress(OSError):
            one.shutdown(socket.SHUT_RDWR)


def to_port(address: str) -> Callable[[], socket.socket]:
    """Return what connects to HOST:PORT."""
    host, _, port = address.rpartition(":")
    return lambda: socket.create_connection((host, int(port)))


def to_unix_socket(path: str) -> Callable[[], socket.socket]:
    """Return what connects to a socket in the file system."""

    def connect() -> socket.socket:
        made = socket.socket(socket.AF_UNIX)
        made.connect(path)
        return made

    return connect
