"""`icm serve`: serve every task as a model of an OpenAI-compatible API."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from icm_cli import engine_config
from icm_cli.command import plain_command as command
from icm_cli.engine_config import Engine
from icm_cli.errors import CliError, UsageProblem
from icm_cli.options import FromOpt, option
from icm_cli.session import Session
from icmlora.io.text import counted, escape, escape_lines, parse_bytes, utc

if TYPE_CHECKING:
    from socket import socket
    from types import ModuleType

    from icmlora.serving.folders import AdapterFolders
    from icmlora.serving.tasks import ServedTasks

EngineUrlOpt = Annotated[
    str | None, option("--engine-url URL", "Address of the engine, such as http://127.0.0.1:8000.")
]
PrintConfigOpt = Annotated[
    Engine | None,
    option(
        "--print-config vllm|sglang",
        "Print the environment and command line that start this engine, then exit.",
    ),
]
BaseModelOpt = Annotated[
    str | None,
    option(
        "--base-model NAME",
        "Base model that the engine runs. Needed if there are several or it cannot be detected.",
        completes="base",
    ),
]
GatewayOpt = Annotated[
    bool, option("--gateway", "With --print-config vllm: run `icm serve` as a gateway instead of the plug-in.")
]
EngineOpt = Annotated[
    Literal["auto", "vllm", "sglang"], option("--engine auto|vllm|sglang", "Type of the engine. auto detects it.")
]
HostOpt = Annotated[str, option("--host ADDRESS", "Address to listen on.")]
PortOpt = Annotated[int, option("--port N", "Port to listen on. 0 picks a free port.", min=0, max=65535)]

_ACCESS = "Access"
TokenOpt = Annotated[
    str | None,
    option(
        "--token TOKEN",
        "Token that clients must send. Visible in the process list, so prefer --token-file or $ICM_SERVE_TOKEN.",
        panel=_ACCESS,
    ),
]
TokenFileOpt = Annotated[Path | None, option("--token-file FILE", "File that contains the token.", panel=_ACCESS)]
NoTokenOpt = Annotated[bool, option("--no-token", "Allow access without a token.", panel=_ACCESS)]
EngineTokenOpt = Annotated[
    str | None,
    option(
        "--engine-token TOKEN",
        "Token for the engine (its --api-key). (env: ICM_ENGINE_TOKEN)",
        panel=_ACCESS,
    ),
]

_ROOM = "Adapters"
AdaptersOpt = Annotated[
    Path | None,
    option(
        "--adapters FOLDER",
        "Folder for written adapters. The engine must see it under the same path. Default: in memory.",
        panel=_ROOM,
    ),
]
AdaptersSizeOpt = Annotated[
    str | None,
    option(
        "--adapters-size SIZE",
        "Space limit for written adapters, such as 4GiB. Default: half of the free space.",
        panel=_ROOM,
    ),
]
MaxAdaptersOpt = Annotated[
    int | None,
    option("--max-adapters N", "Maximum number of loaded adapters. Default: as many as fit.", panel=_ROOM, min=1),
]
MaxWaitingOpt = Annotated[
    int,
    option(
        "--max-waiting N",
        "Maximum number of tasks waiting to load. Requests beyond it get status 503.",
        panel=_ROOM,
        min=1,
    ),
]

_LIMITS = "Limits"
MaxRequestsOpt = Annotated[
    int,
    option(
        "--max-requests N",
        "Maximum number of concurrent requests. Further requests get status 503.",
        panel=_LIMITS,
        min=1,
    ),
]
MaxConnectionsOpt = Annotated[
    int,
    option(
        "--max-connections N",
        "Maximum number of connections per client address, at most a third of the file descriptors.",
        panel=_LIMITS,
        min=1,
    ),
]
MaxBodyOpt = Annotated[str, option("--max-body SIZE", "Maximum size of a request body.", panel=_LIMITS)]


def _seconds(name: str, text: str) -> Any:
    return option(f"{name} SECONDS", text, min=0.01, panel=_LIMITS)


_HEADER_SECONDS = 30.0
BodyTimeoutOpt = Annotated[
    float,
    _seconds("--body-timeout", f"Timeout for receiving a request; at most {_HEADER_SECONDS:g} for its headers."),
]
FirstByteTimeoutOpt = Annotated[
    float, _seconds("--first-byte-timeout", "Timeout for the first byte of the engine's response.")
]
IdleTimeoutOpt = Annotated[
    float, _seconds("--idle-timeout", "Timeout for the next part of a body, in either direction.")
]
DrainOpt = Annotated[
    float, _seconds("--drain-seconds", "Time for requests in flight to finish after SIGTERM or Ctrl-C.")
]
AccessLogOpt = Annotated[bool, option("--access-log", "Log every request.")]


@command
def serve(
    session: Session,
    engine_url: EngineUrlOpt = None,
    engine: EngineOpt = "auto",
    bundle: FromOpt = None,
    base_model: BaseModelOpt = None,
    print_config: PrintConfigOpt = None,
    gateway: GatewayOpt = False,
    host: HostOpt = "127.0.0.1",
    port: PortOpt = 8080,
    access_log: AccessLogOpt = False,
    token: TokenOpt = None,
    token_file: TokenFileOpt = None,
    no_token: NoTokenOpt = False,
    engine_token: EngineTokenOpt = None,
    adapters: AdaptersOpt = None,
    adapters_size: AdaptersSizeOpt = None,
    max_adapters: MaxAdaptersOpt = None,
    max_waiting: MaxWaitingOpt = 64,
    max_requests: MaxRequestsOpt = 512,
    max_connections: MaxConnectionsOpt = 1024,
    max_body: MaxBodyOpt = "64MiB",
    body_timeout: BodyTimeoutOpt = 300.0,
    first_byte_timeout: FirstByteTimeoutOpt = 600.0,
    idle_timeout: IdleTimeoutOpt = 120.0,
    drain_seconds: DrainOpt = 30.0,
) -> None:
    """Serve every task as a model of an OpenAI-compatible API.

    `icm serve` is a gateway to vLLM or SGLang. When a request names a task as its model, icm writes the adapter and the
    engine loads it. Other requests are forwarded unchanged. The server prints its address when it is ready. After
    SIGTERM or Ctrl-C it finishes the requests in flight.

    --print-config prints shell commands that start the engine. vLLM loads tasks through icm's plug-in and needs no
    gateway, but SGLang does. Notes on stderr report a missing base model and tasks that the engine cannot serve.

    Example:
      icm serve --print-config vllm
      icm serve --engine-url http://127.0.0.1:8000
    """
    if print_config is not None:
        engine_config.print_config(session, print_config, bundle, base_model, gateway=gateway)
        return
    if engine_url is None:
        hint = "start an engine (see `icm serve --print-config vllm`) and pass its address"
        raise UsageProblem("--engine-url is missing", hint=hint)
    from icmlora.serving.gateway.settings import GatewaySettings

    server, known_token = _server(), _token(token, token_file, no_token)
    settings = GatewaySettings(
        engine_url=_address(engine_url),
        engine=None if engine == "auto" else engine,
        engine_token=engine_token or os.environ.get("ICM_ENGINE_TOKEN") or None,
        base_model=base_model,
        token=known_token,
        local_names=frozenset({host.lower()}) if known_token is None and not no_token else None,
        max_connections=max_connections,
        max_adapters=max_adapters,
        max_requests=max_requests,
        max_waiting=max_waiting,
        max_body=parse_bytes(max_body),
        header_timeout=min(body_timeout, _HEADER_SECONDS),
        body_timeout=body_timeout,
        first_byte_timeout=first_byte_timeout,
        idle_timeout=idle_timeout,
        drain=drain_seconds,
        access_log=access_log,
    )
    tasks = _tasks(session, bundle, base_model)
    with closing(_folders(adapters, adapters_size)) as folders, server.listen(host, port) as listening:
        _check_local(host, listening, everyone=no_token or known_token is not None)
        _print_address(session, listening, len(tasks.names()), settings.engine_url)
        with _logging(session, access_log=access_log):
            server.serve(listening, tasks, folders, settings)


def _check_local(host: str, listening: socket, *, everyone: bool) -> None:
    if not everyone and not ip_address(listening.getsockname()[0]).is_loopback:
        hint = "set a token with --token-file FILE, or allow open access with --no-token"
        raise UsageProblem(f"serving on {host} without a token gives everyone access", hint=hint)


_EXTRA = ("fastapi", "httpx", "prometheus_client", "starlette", "uvicorn")


def _server() -> ModuleType:
    """Import the gateway."""
    try:
        from icmlora.serving.gateway import server
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in _EXTRA:
            raise
        fact = f"`icm serve` needs the package {error.name}, which is not installed"
        raise CliError(fact, hint="install the extra: pip install 'icm-lora[serve]'") from error
    return server


def _tasks(session: Session, bundle: Path | None, base_model: str | None) -> ServedTasks:
    """Open the tasks of the store or bundle, and check the base model."""
    from icmlora.fleet.context import check_base_model
    from icmlora.serving.tasks import open_tasks

    store = None if bundle is not None else session.settings.store.value
    tasks = open_tasks(store, bundle, command=session.command, lock_timeout=session.settings.lock_timeout.value)
    check_base_model(base_model, {name for names in tasks.base_models().values() for name in names})
    return tasks


def _address(url: str) -> str:
    if not url.startswith(("http://", "https://")):
        raise UsageProblem(f"{url!r} is not an HTTP address", hint="write it as http://127.0.0.1:8000")
    return url.rstrip("/").removesuffix("/v1")  # OpenAI clients add /v1


def _folders(root: Path | None, size: str | None) -> AdapterFolders:
    from icmlora.serving.folders import AdapterFolders, default_root

    limit = None if size is None else parse_bytes(size)
    return AdapterFolders(default_root("gateway") if root is None else root.resolve(), limit, alone=True)


def _token(given: str | None, file: Path | None, none: bool) -> str | None:
    """Return the token for clients from the option, the file or the environment. None: no token is required."""
    if sum((given is not None, file is not None, none)) > 1:
        raise UsageProblem("--token, --token-file and --no-token are mutually exclusive")
    if none:
        return None
    if file is not None:
        given = file.read_text(encoding="utf-8", errors="replace").strip()
    elif given is None:
        given = os.environ.get("ICM_SERVE_TOKEN") or None
    if given is not None and not (given.isascii() and given.isprintable() and given and " " not in given):
        raise UsageProblem("the token is invalid", hint="use printable ASCII characters without spaces")
    return given


def _print_address(session: Session, listening: socket, tasks: int, engine_url: str) -> None:
    host, port = listening.getsockname()[:2]
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    session.out.event("listening", url=url, engine_url=engine_url, tasks_count=tasks)
    # The server logs the tasks for the engine's base model once the engine responds.
    session.out.note(f"serving {counted(tasks, 'task')} through the engine at {engine_url}")
    if not tasks:
        session.out.warn("there are no tasks to serve yet")
        session.out.hint("run `icm ingest` to add adapters to the store")
    session.out.answer(url)
    sys.stdout.flush()


@contextmanager
def _logging(session: Session, *, access_log: bool) -> Iterator[None]:
    """Write the server's log to stderr, one line per event."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Lines(as_json=session.out.is_json))
    level = logging.WARNING if session.out.is_quiet else logging.INFO
    levels = {"icmlora": level, "uvicorn.error": logging.WARNING}
    if access_log:
        levels["uvicorn.access"] = logging.INFO
    before = {name: logging.getLogger(name).level for name in levels}
    for name, least in levels.items():
        logging.getLogger(name).setLevel(least)
        logging.getLogger(name).addHandler(handler)
    try:
        yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)
            logging.getLogger(name).removeHandler(handler)


class _Lines(logging.Formatter):
    """Format a log record. Messages can contain text from engines and clients, so they are escaped."""

    def __init__(self, *, as_json: bool) -> None:
        super().__init__()
        self._as_json = as_json

    def format(self, record: logging.LogRecord) -> str:
        """Return a line, and the traceback of an unexpected error."""
        when, message = utc(datetime.fromtimestamp(record.created, UTC)), record.getMessage()
        trace = "" if record.exc_info is None else self.formatException(record.exc_info)
        if self._as_json:
            fields = {"type": "log", "time": when, "level": record.levelname.lower(), "message": message}
            return json.dumps(fields | ({"traceback": trace} if trace else {}))
        mark = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        return escape(f"{when} {mark}{message}") + (f"\n{escape_lines(trace)}" if trace else "")
