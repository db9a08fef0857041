"""A server that stands between a client and the S3 server, and does to some requests what networks and buckets do."""

from __future__ import annotations

import http.client
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

_OWN = {"connection", "keep-alive", "transfer-encoding", "content-length"}


@dataclass
class Answer:
    """What is sent back: to be changed by a fault."""

    status: int
    headers: dict[str, str]
    body: bytes
    cut: int | None = None  # bytes of the body after which the connection ends
    is_lost: bool = False  # no answer at all, although the server has done what was asked


@dataclass
class Fault:
    """Something that happens to requests.

    Attributes:
        of: Of which: a pattern of "METHOD PATH".
        times: How often.
        skip: How many of them are let pass before.
        before: Changes the body that is sent on, or returns an answer in place of the server's.
        after: Changes the answer.
        seen: How many requests it was of.
    """

    of: str = ""
    times: float = 1
    skip: int = field(default=0, kw_only=True)
    before: Callable[[bytes], bytes | Answer] = lambda body: body
    after: Callable[[Answer], None] = lambda answer: None
    seen: int = field(default=0, init=False)


def refuses(status: int) -> Callable[[bytes], Answer]:
    """Return what answers with an error of the server."""
    body = b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>reduce your rate</Message></Error>"
    return lambda _: Answer(status, {"Content-Type": "application/xml"}, body)


def sleeps(seconds: float) -> Callable[[bytes], bytes]:
    """Return what lets a request wait."""

    def wait(body: bytes) -> bytes:
        time.sleep(seconds)
        return body

    return wait


def flipped(body: bytes) -> bytes:
    """Flip a bit in the middle."""
    changed = bytearray(body)
    if changed:
        changed[len(changed) // 2] ^= 1
    return bytes(changed)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128  # a client opens many connections at once


class FaultyServer:
    """Forwards requests; `faults` says to which of them something happens."""

    def __init__(self, target: str) -> None:
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self._lock = threading.Lock()
        self._target = urlsplit(target).netloc
        self._server = _Server(("127.0.0.1", 0), self._handler())
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    @contextmanager
    def running(self) -> Iterator[FaultyServer]:
        thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            self._server.server_close()
            thread.join()

    def _fault(self, request: str) -> Fault:
        with self._lock:
            self.requests.append(request)
            for fault in self.faults:
                if fault.seen >= fault.times or not re.search(fault.of, request):
                    continue
                if fault.skip:
                    fault.skip -= 1
                    continue
                fault.seen += 1
                return fault
        return Fault()

    def _forwarded(self, method: str, path: str, headers: dict[str, str], body: bytes) -> Answer:
        connection = http.client.HTTPConnection(self._target, timeout=60)
        try:
            # The client has signed the name of the host that it called.
            connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
            for name, value in headers.items():
                connection.putheader(name, value)
            connection.endheaders(body)
            answer = connection.getresponse()
            return Answer(answer.status, dict(answer.getheaders()), answer.read())
        finally:
            connection.close()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _forward(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                fault = server._fault(f"{self.command} {self.path}")
                sent = fault.before(body)
                headers = dict(self.headers.items())
                answer = sent if isinstance(sent, Answer) else server._forwarded(self.command, self.path, headers, sent)
                fault.after(answer)
                with suppress(ConnectionError):  # the client has given up
                    self._answer(answer)

            do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _forward

            def _answer(self, answer: Answer) -> None:
                if answer.is_lost:
                    self.close_connection = True
                    return
                self.send_response(answer.status)
                for name, value in answer.headers.items():
                    if name.lower() not in _OWN:
                        self.send_header(name, value)
                length = answer.headers.get("Content-Length") if self.command == "HEAD" else len(answer.body)
                self.send_header("Content-Length", str(length or 0))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(answer.body if answer.cut is None else answer.body[: answer.cut])
                if answer.cut is not None:
                    self.close_connection = True

            def log_message(self, format: str, *args: object) -> None:
                pass

        return Handler
