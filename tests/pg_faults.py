"""A server that stands between clients and PostgreSQL, and ends a connection before or after a chosen statement."""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

_STATEMENTS = {b"Q", b"E"}  # a simple query; the execution of one that was prepared
_READY = b"Z"
_SOCKET = ".s.PGSQL.5432"
_HOST = re.compile(r"(?<=[?&]host=)[^&]*")


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


class CuttingServer:
    """Forwards connections to a server; `cut` says where one ends.

    Args:
        target: The address of the server, which listens on a Unix socket.
        folder: An empty folder for a socket.
    """

    def __init__(self, target: str, folder: Path) -> None:
        match = _HOST.search(target)
        assert match is not None
        self._target, self._folder = f"{match[0]}/{_SOCKET}", folder
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._listening = socket.socket(socket.AF_UNIX)
        self.statements = 0
        self.cut: Cut | None = None

    def address(self, database: str) -> str:
        """Return the address of a database of the server, by way of this one."""
        return _HOST.sub(str(self._folder), database)

    def begin(self, cut: Cut | None) -> None:
        """Count from 1 again."""
        with self._lock:
            self.statements, self.cut = 0, cut

    @contextmanager
    def running(self) -> Iterator[CuttingServer]:
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
            for each in list(self._open):
                _end(each)
            thread.join()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listening.accept()
            except OSError:
                return
            if self.cut is not None and self.cut.is_done and self.cut.is_away:
                client.close()
                continue
            server = socket.socket(socket.AF_UNIX)
            try:
                server.connect(self._target)
            except OSError:  # it restarts
                client.close()
                server.close()
                continue
            self._open |= {client, server}
            connection = _Connection(self, client, server)
            for run in (connection.to_server, connection.to_client):
                threading.Thread(target=run, daemon=True).start()

    def fate_of_statement(self) -> Cut | None:
        """Count a statement, and return the cut if it is the one."""
        with self._lock:
            self.statements += 1
            if self.cut is None or self.statements != self.cut.at:
                return None
            self.cut.is_done = True
            return self.cut

    def gone(self, *sockets: socket.socket) -> None:
        """Forget the two ends of a connection."""
        self._open -= set(sockets)


class _Connection:
    """One client and the server."""

    def __init__(self, owner: CuttingServer, client: socket.socket, server: socket.socket) -> None:
        self._owner, self._client, self._server = owner, client, server
        self._is_swallowing = False  # what the server answers is not told

    def to_server(self) -> None:
        """Forward what the client says, message by message."""
        with suppress(OSError):
            head = _read(self._client, 4)  # what it begins with has no kind
            self._server.sendall(head + _read(self._client, int.from_bytes(head) - 4))
            while kind := _read(self._client, 1):
                head = _read(self._client, 4)
                message = kind + head + _read(self._client, int.from_bytes(head) - 4)
                fate = self._owner.fate_of_statement() if kind in _STATEMENTS and not self._is_swallowing else None
                if fate is not None and fate.when == "before":
                    break
                self._is_swallowing |= fate is not None
                self._server.sendall(message)
        self._close()

    def to_client(self) -> None:
        """Forward what the server says, as it comes."""
        with suppress(OSError):
            while some := self._server.recv(1 << 16):
                if self._is_swallowing:
                    self._wait_until_done(some)
                    break
                self._client.sendall(some)
        self._close()

    def _wait_until_done(self, some: bytes) -> None:
        """Read on until the server is done with the statement."""
        while some:
            at = 0
            while at + 5 <= len(some):
                if some[at : at + 1] == _READY:
                    return
                at += 1 + int.from_bytes(some[at + 1 : at + 5])
            some += self._server.recv(1 << 16) or b"Z\0\0\0\5"

    def _close(self) -> None:
        for end in (self._client, self._server):
            _end(end)
        self._owner.gone(self._client, self._server)


def _read(end: socket.socket, size: int) -> bytes:
    """Return so many bytes, or none if the other side is gone."""
    data = bytearray()
    while len(data) < size:
        some = end.recv(size - len(data))
        if not some:
            return b""
        data += some
    return bytes(data)


def _end(end: socket.socket) -> None:
    with suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)
    end.close()
