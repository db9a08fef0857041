"""The gateway's own error responses, in OpenAI's format."""

from __future__ import annotations

import json


class HttpProblem(Exception):
    """An error response of the gateway.

    Args:
        status: HTTP status.
        message: One sentence, for the client.
        code: A short stable word for the reason.
        retry_after: Seconds until a retry.
        closes: Whether to close the connection, because the rest of the request is ambiguous or missing.
    """

    def __init__(
        self, status: int, message: str, code: str, *, retry_after: int | None = None, closes: bool = False
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code
        self.retry_after, self.closes = retry_after, closes

    def headers(self) -> list[tuple[bytes, bytes]]:
        """Return the headers of the response."""
        headers = [(b"content-type", b"application/json")]
        if self.retry_after is not None:
            headers.append((b"retry-after", str(self.retry_after).encode()))
        if self.closes:
            headers.append((b"connection", b"close"))
        if self.status == 401:
            headers.append((b"www-authenticate", b"Bearer"))
        return headers

    def body(self) -> bytes:
        """Return the response body as JSON."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        error = {"message": self.message, "type": kind, "param": None, "code": self.code}
        return json.dumps({"type": "error", "error": error}).encode()  # the outer "type" is for clients of /v1/messages

    def event(self) -> bytes:
        """Return the problem as the last event of a stream."""
        return b"event: error\ndata: " + self.body() + b"\n\n"
