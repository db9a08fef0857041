"""Servers that stand between clients and PostgreSQL: one may be away, one ends a connection at some statement."""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

_SOCKET = ".s.PGSQL.5432"
_HOST = re.compile(r"(?<=[?&]host=)[^&]*")
_CHUNK = 1 << 16
_STATEMENTS = {b"Q", b"E"}  # a simple query; the execution of one that was prepared
_READY = b"Z"

Forward = Callable[[socket.socket, socket.socket], None]


class Proxy:
    """Forwards connections to a server.

    Args:
        target: An address of the server, which listens on a Unix socket.
        folder: An empty folder for a socket; its path is short.
    """

    def __init__(self, target: str, folder: Path) -> None:
        match = _HOST.search(target)
        assert match is not None
        self._target, self._folder = f"{match[0]}/{_SOCKET}", folder
        self._open: set[socket.socket] = set()
        self._listening = socket.socket(socket.AF_UNIX)

    def address(self, database: str) -> str:
        """Return the address of a database of the server, by way of this one."""
        return _HOST.sub(str(self._folder), database)

    @contextmanager
    def running(self) -> Iterator[Self]:
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
            self.end_all()
            thread.join()

    def end_all(self) -> None:
        """End all connections."""
        self.end(*self._open)

    def end(self, *ends: socket.socket) -> None:
        """End connections, and forget them."""
        for end in ends:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
        self._open -= set(ends)

    def refuses(self) -> bool:
        """Say whether nobody may connect now."""
        raise NotImplementedError

    def to_server(self, client: socket.socket, server: socket.socket) -> None:
        """Forward what a client says until one of them is gone."""
        raise NotImplementedError

    def to_client(self, server: socket.socket, client: socket.socket) -> None:
        """Forward what the server says until one of them is gone."""
        raise NotImplementedError

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listening.accept()
            except OSError:
                return
            server = socket.socket(socket.AF_UNIX)
            try:
                if self.refuses():
                    raise ConnectionRefusedError
                server.connect(self._target)
            except OSError:  # it may restart
                client.close()
                server.close()
                continue
            self._open |= {client, server}
            for run, ends in ((self.to_server, (client, server)), (self.to_client, (server, client))):
                threading.Thread(target=self._forward, args=(run, *ends), daemon=True).start()

    def _forward(self, run: Forward, source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            run(source, target)
        self.end(source, target)


class MovingServer(Proxy):
    """Can be away, or stopped, as a server may be.

    Attributes:
        connections: How many were accepted.
        sends: How often clients have sent something.
    """

    def __init__(self, target: str, folder: Path) -> None:
        super().__init__(target, folder)
        self._flows = threading.Event()
        self._flows.set()
        self._is_away = False
        self.connections = self.sends = 0

    def leave(self) -> None:
        """End all connections and accept no more."""
        self._is_away = True
        self.end_all()

    def stop(self) -> None:
        """Accept connections and answer nothing, as a stopped process does."""
        self._flows.clear()

    def come_back(self) -> None:
        """Go on."""
        self._is_away = False
        self._flows.set()

    @contextmanager
    def running(self) -> Iterator[Self]:
        """Listen for a block."""
        with super().running():
            yield self
            self._flows.set()

    def refuses(self) -> bool:
        """Say whether it is away."""
        return self._is_away

    def to_server(self, client: socket.socket, server: socket.socket) -> None:
        """Forward what comes, unless it is stopped."""
        self.connections += 1
        while some := client.recv(_CHUNK):
            self._flows.wait()
            self.sends += 1
            server.sendall(some)

    def to_client(self, server: socket.socket, client: socket.socket) -> None:
        """Forward what comes, unless it is stopped."""
        while some := server.recv(_CHUNK):
            self._flows.wait()
            client.sendall(some)


@dataclass
class Cut:
    """Where a connection ends.

    Attributes:
        at: The number of the statement, counted over all connections from 1.
        when: Before the server gets it, or after the server has done it and before the client hears of it.
        is_away: Whether nobody can connect from then on.
        is_done: Whether it came to that.
    """

    at: int
    when: Literal["before", "after"]
    is_away: bool = False
    is_done: bool = False


class CuttingServer(Proxy):
    """Ends a connection before or after a statement.

    Attributes:
        statements: How many there were.
        cut: Where a connection ends.
    """

    def __init__(self, target: str, folder: Path) -> None:
        super().__init__(target, folder)
        self._lock = threading.Lock()
        self._unanswered: set[socket.socket] = set()  # clients that do not hear of what the server answers
        self.statements = 0
        self.cut: Cut | None = None

    def begin(self, cut: Cut | None) -> None:
        """Count from 1 again."""
        with self._lock:
            self.statements, self.cut = 0, cut

    def refuses(self) -> bool:
        """Say whether a connection was cut, and is the last one."""
        return self.cut is not None and self.cut.is_done and self.cut.is_away

    def to_server(self, client: socket.socket, server: socket.socket) -> None:
        """Forward what the client says, message by message."""
        head = _read(client, 4)  # what it begins with has no kind
        server.sendall(head + _read(client, int.from_bytes(head) - 4))
        while kind := _read(client, 1):
            head = _read(client, 4)
            message = kind + head + _read(client, int.from_bytes(head) - 4)
            fate = self._fate_of_statement() if kind in _STATEMENTS and client not in self._unanswered else None
            if fate is not None:
                if fate.when == "before":
                    return
                self._unanswered.add(client)
            server.sendall(message)

    def to_client(self, server: socket.socket, client: socket.socket) -> None:
        """Forward what the server says, as it comes."""
        while some := server.recv(_CHUNK):
            if client in self._unanswered:
                _wait_until_ready(server, some)
                return
            client.sendall(some)

    def _fate_of_statement(self) -> Cut | None:
        """Count a statement, and return the cut if it is the one."""
        with self._lock:
            self.statements += 1
            if self.cut is None or self.statements != self.cut.at:
                return None
            self.cut.is_done = True
            return self.cut


def _wait_until_ready(server: socket.socket, some: bytes) -> None:
    """Read on until the server is done with a statement."""
    while some:
        at = 0
        while at + 5 <= len(some):
            if some[at : at + 1] == _READY:
                return
            at += 1 + int.from_bytes(some[at + 1 : at + 5])
        some += server.recv(_CHUNK) or b"Z\0\0\0\5"


def _read(end: socket.socket, size: int) -> bytes:
    """Return so many bytes, or none if the other side is gone."""
    data = bytearray()
    while len(data) < size:
        some = end.recv(size - len(data))
        if not some:
            return b""
        data += some
    return bytes(data)
