"""A server that stands between clients and PostgreSQL, and can be away, or stopped, as a server may be."""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_SOCKET = ".s.PGSQL.5432"
_HOST = re.compile(r"(?<=[?&]host=)[^&]*")


class MovingServer:
    """Forwards connections to a server that listens on a Unix socket.

    Args:
        target: An address of that server.
        folder: An empty folder for a socket; its path is short.

    Attributes:
        connections: How many were accepted.
        sends: How often clients have sent something.
    """

    def __init__(self, target: str, folder: Path) -> None:
        match = _HOST.search(target)
        assert match is not None
        self._target, self._folder = f"{match[0]}/{_SOCKET}", folder
        self._flows = threading.Event()
        self._flows.set()
        self._is_away = False
        self._open: set[socket.socket] = set()
        self._listening = socket.socket(socket.AF_UNIX)
        self.connections = self.sends = 0

    def address(self, database: str) -> str:
        """Return the address of a database of the server, by way of this one."""
        return _HOST.sub(str(self._folder), database)

    def leave(self) -> None:
        """End all connections and accept no more."""
        self._is_away = True
        for each in list(self._open):
            _end(each)

    def stop(self) -> None:
        """Accept connections and answer nothing, as a stopped process does."""
        self._flows.clear()

    def come_back(self) -> None:
        """Go on."""
        self._is_away = False
        self._flows.set()

    @contextmanager
    def running(self) -> Iterator[MovingServer]:
        """Listen for a block."""
        self._listening.bind(str(self._folder / _SOCKET))
        self._listening.listen(64)
        thread = threading.Thread(target=self._accept, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._listening.shutdown(socket.SHUT_RDWR)
            self._listening.close()
            self.leave()
            self._flows.set()
            thread.join()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listening.accept()
            except OSError:
                return
            if self._is_away:
                client.close()
                continue
            self.connections += 1
            server = socket.socket(socket.AF_UNIX)
            server.connect(self._target)
            self._open |= {client, server}
            threading.Thread(target=self._forward, args=(client, server, 1), daemon=True).start()
            threading.Thread(target=self._forward, args=(server, client, 0), daemon=True).start()

    def _forward(self, source: socket.socket, target: socket.socket, counted: int) -> None:
        with suppress(OSError):
            while some := source.recv(1 << 16):
                self._flows.wait()
                self.sends += counted
                target.sendall(some)
        for end in (source, target):
            _end(end)
            self._open.discard(end)


def _end(end: socket.socket) -> None:
    with suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)
    end.close()
