"""An engine that has the routes of vLLM or SGLang and no model: it answers with what it was asked, or misbehaves.

It opens an adapter's folder when it loads it, and again for each request, as vLLM does when it has dropped the adapter
from its memory: a folder that was deleted too early shows.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import uvicorn

from icmlora.serving.gateway.server import listen

PIECES = 3  # of a streamed answer


@dataclass
class StubEngine:
    """What the engine is and has, and how it misbehaves.

    Attributes:
        kind: Whose routes it has.
        model: What it was started with.
        base: The name under which clients ask for its base model.
        adapters: Loaded adapters: name -> folder.
        asked: Every request: method, path, body.
        headers: The headers of the latest request that was no administration.
        gone: Adapters whose folder was not there when a request needed it.
        aborted: Requests whose client left.
        load_answer: Status and body for requests to load, in place of loading.
        lies: Say that an adapter is loaded, but do not load it.
        delay: Seconds before an answer begins.
        between: Seconds between the pieces of a stream.
        dies_after: Close the connection after so many pieces of a stream.
        hold: Requests wait for it, if it is there.
        holds_load: Requests to load wait for it, if it is there.
        token: What it wants to be told.
        is_prepared: Whether it loads adapters while it runs.
        listed: An answer to the list of models in place of the right one.
        longest: Bytes of the longest request that it answers.
        counts: What it answers to a request for its metrics.
    """

    kind: Literal["vllm", "sglang"] = "vllm"
    model: str = "tiny/llama"
    base: str = "base"
    adapters: dict[str, str] = field(default_factory=dict)
    asked: list[tuple[str, str, bytes]] = field(default_factory=list)
    headers: dict[str, str] = field(default_factory=dict)
    gone: list[str] = field(default_factory=list)
    aborted: int = 0
    load_answer: tuple[int, Any] | None = None
    lies: bool = False
    delay: float = 0.0
    between: float = 0.0
    dies_after: int | None = None
    hold: threading.Event | None = None
    holds_load: threading.Event | None = None
    token: str | None = None
    is_prepared: bool = True
    listed: Any = None
    longest: int | None = None
    counts: str = ""

    def bodies(self, path: str) -> list[Any]:
        """Return the bodies of the requests to a route."""
        return [json.loads(body) for _, asked, body in self.asked if asked == path]

    @property
    def loads(self) -> list[str]:
        """The adapters that it was asked to load, in order."""
        return [body["lora_name"] for body in self.bodies(self._route("load_lora_adapter"))]

    @property
    def unloads(self) -> list[str]:
        """The adapters that it was asked to unload, in order."""
        return [body["lora_name"] for body in self.bodies(self._route("unload_lora_adapter"))]

    def _route(self, name: str) -> str:
        return f"/v1/{name}" if self.kind == "vllm" else f"/{name}"

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        method, path = scope["method"], scope["path"]
        if method == "GET" and path == self._route("load_lora_adapter"):  # whether it has the route
            return await _answer(send, 405 if self.is_prepared else 404, {"detail": "no GET"})
        self.asked.append((method, path, body))
        headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        if self.token is not None and headers.get("authorization") != f"Bearer {self.token}":
            return await _answer(send, 401, {"error": "Unauthorized"})
        if (method, path) == ("GET", "/v1/models"):
            return await _answer(send, 200, self._list() if self.listed is None else self.listed)
        if (method, path, self.kind) == ("GET", "/model_info", "sglang"):
            return await _answer(send, 200, {"model_path": self.model})
        if path == self._route("load_lora_adapter"):
            return await self._load(send, json.loads(body))
        if path == self._route("unload_lora_adapter"):
            return await self._unload(send, json.loads(body))
        if (method, path) == ("GET", "/metrics"):
            return await _answer(send, 200, self.counts.encode())
        self.headers = headers
        if self.longest is not None and len(body) > self.longest:
            text = f"This model's maximum context length is {self.longest} tokens."
            return await _answer(send, 400, {"error": {"message": text, "code": 400}})
        await self._complete(receive, send, method, path, body)

    def _list(self) -> Any:
        base = {"id": self.base, "object": "model", "owned_by": self.kind, "parent": None}
        base["root"] = self.model if self.kind == "vllm" else self.base
        adapters = [{"id": name, "root": path, "parent": self.base} for name, path in self.adapters.items()]
        return {"object": "list", "data": [base, *adapters]}

    async def _load(self, send: Any, asked: dict[str, str]) -> None:
        while self.holds_load is not None and not self.holds_load.is_set():
            await asyncio.sleep(0.01)
        name, path = asked["lora_name"], asked["lora_path"]
        if self.load_answer is not None:
            return await _answer(send, *self.load_answer)
        if name in self.adapters:
            return await _answer(send, 400, {"error": {"message": f"{name} has already been loaded"}})
        config = json.loads((Path(path) / "adapter_config.json").read_text())
        assert config["peft_type"] == "LORA"
        if not self.lies:
            self.adapters[name] = path
        await _answer(send, 200, {"success": True})

    async def _unload(self, send: Any, asked: dict[str, str]) -> None:
        if asked["lora_name"] not in self.adapters:
            return await _answer(send, 404, {"error": {"message": "cannot be found"}})
        del self.adapters[asked["lora_name"]]
        await _answer(send, 200, {"success": True})

    def _missing(self, fields: dict[str, Any]) -> tuple[int, Any] | None:
        """Answer as the engine does for an adapter that it has not; None if it has what is asked for."""
        model = str(fields.get("model"))
        if self.kind == "vllm":
            if model == self.base or model in self.adapters or "model" not in fields:
                return None
            return 404, {"error": {"message": f"The model `{model}` does not exist.", "code": 404}}
        adapter = model.removeprefix(f"{self.base}:") if ":" in model else None
        if adapter is None or adapter in self.adapters:
            return None
        return 400, {"object": "error", "message": f"Got LoRA adapter that has never been loaded: {adapter}"}

    async def _complete(self, receive: Any, send: Any, method: str, path: str, body: bytes) -> None:
        fields = json.loads(body) if body else {}
        if (missing := self._missing(fields)) is not None:
            return await _answer(send, *missing)
        name = str(fields.get("model")).rpartition(":")[2]
        try:
            await self._hold(receive)
        except ConnectionResetError:
            self.aborted += 1
            return
        if name in self.adapters and not (Path(self.adapters[name]) / "adapter_config.json").is_file():
            self.gone.append(name)
        if not fields.get("stream"):
            return await _answer(send, 200, {"path": path, "method": method, "asked": fields})
        await self._stream(receive, send)

    async def _hold(self, receive: Any) -> None:
        """Wait as long as the engine is to be slow; notice a client that leaves."""
        leaving = asyncio.ensure_future(receive())
        try:
            until = asyncio.get_running_loop().time() + self.delay
            while asyncio.get_running_loop().time() < until or (self.hold is not None and not self.hold.is_set()):
                await asyncio.wait({leaving}, timeout=0.005)
                if leaving.done():
                    raise ConnectionResetError
        finally:
            leaving.cancel()

    async def _stream(self, receive: Any, send: Any) -> None:
        leaving = asyncio.ensure_future(receive())
        try:
            await _begin(send, 200, "text/event-stream; charset=utf-8", None)
            for number in range(PIECES):
                if number == self.dies_after:
                    return  # without an end: the server closes the connection
                data = b'data: {"piece": %d}\n\n' % number
                await send({"type": "http.response.body", "body": data, "more_body": True})
                await asyncio.wait({leaving}, timeout=self.between)
                if leaving.done():
                    self.aborted += 1
                    return
            await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})
        finally:
            leaving.cancel()


async def _answer(send: Any, status: int, value: Any) -> None:
    data = value if isinstance(value, bytes) else json.dumps(value).encode()
    await _begin(send, status, "application/json", len(data))
    await send({"type": "http.response.body", "body": data})


async def _begin(send: Any, status: int, kind: str, length: int | None) -> None:
    headers = [(b"content-type", kind.encode()), (b"x-engine", b"stub")]
    headers += [] if length is None else [(b"content-length", str(length).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})


@contextmanager
def running(app: Any, port: int = 0) -> Iterator[str]:
    """Run an ASGI application on a port of this machine, in a thread; yield its URL."""
    listening = listen("127.0.0.1", port)
    config = uvicorn.Config(
        app, http="h11", ws="none", lifespan="off", interface="asgi3", log_config=None, timeout_keep_alive=5
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = server.force_exit = True
        thread.join()
        listening.close()
