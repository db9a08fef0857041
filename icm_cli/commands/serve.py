"""`icm serve`: serve every task as a model of an OpenAI-compatible API."""

from __future__ import annotations

import json
import logging
import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from icm_cli.command import Call, command
from icm_cli.errors import CliError, UsageProblem
from icm_cli.session import Session
from icmlora.fleet.context import check_base_model
from icmlora.fleet.params import BundleFile, Param
from icmlora.io.text import counted, escape, escape_lines, parse_bytes, utc
from icmlora.serving.folders import AdapterFolders, default_root
from icmlora.serving.gateway.settings import ACCESS, ADAPTERS, MAX_HEADER_SECONDS, GatewaySettings, gateway_settings
from icmlora.serving.requirements import EngineName

if TYPE_CHECKING:
    from socket import socket

    from icmlora.serving.tasks import ServedTasks

_PACKAGES = ("fastapi", "httpx", "prometheus_client", "starlette", "uvicorn")  # of the extra


@command(gateway_settings)
def serve(
    session: Session,
    call: Call[GatewaySettings],
    bundle: BundleFile = None,
    print_config: Annotated[
        EngineName | None,
        Param(
            "Print the environment and command line that start this engine, then exit.", "--print-config vllm|sglang"
        ),
    ] = None,
    gateway: Annotated[
        bool, Param("With --print-config vllm: run `icm serve` as a gateway instead of the plug-in.")
    ] = False,
    token_file: Annotated[Path | None, Param("File that contains the token.", "--token-file FILE", ACCESS)] = None,
    no_token: Annotated[bool, Param("Allow access without a token.", panel=ACCESS)] = False,
    adapters: Annotated[
        Path | None,
        Param(
            "Folder for written adapters. The engine must see it under the same path. Default: in memory.",
            "--adapters FOLDER",
            ADAPTERS,
        ),
    ] = None,
    adapters_size: Annotated[
        str | None,
        Param(
            "Space limit for written adapters, such as 4GiB. Default: half of the free space.",
            "--adapters-size SIZE",
            ADAPTERS,
        ),
    ] = None,
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
        _print_config(session, print_config, bundle, call["base_model"], gateway=gateway)
        return
    if not call["engine_url"]:
        hint = "start an engine (see `icm serve --print-config vllm`) and pass its address"
        raise UsageProblem("--engine-url is missing", hint=hint)
    try:
        from icmlora.serving.gateway import server
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in _PACKAGES:
            raise
        fact = f"`icm serve` needs the package {error.name}, which is not installed"
        raise CliError(fact, hint="install the extra: pip install 'icm-lora[serve]'") from error

    host, token = call["host"], _token(call["token"], token_file, no_token)
    is_open = no_token or token is not None
    settings = call.now(
        token=token,
        local_names=None if is_open else frozenset({host.lower()}),
        engine_token=call["engine_token"] or os.environ.get("ICM_ENGINE_TOKEN") or None,
        header_timeout=min(call["body_timeout"], MAX_HEADER_SECONDS),
    )
    tasks = _open_tasks(session, bundle)
    check_base_model(settings.base_model, {name for names in tasks.base_models().values() for name in names})
    root = default_root("gateway") if adapters is None else adapters.resolve()
    limit = None if adapters_size is None else parse_bytes(adapters_size)
    with closing(AdapterFolders(root, limit, alone=True)) as folders, server.listen(host, settings.port) as listening:
        if not is_open and not ip_address(listening.getsockname()[0]).is_loopback:
            hint = "set a token with --token-file FILE, or allow open access with --no-token"
            raise UsageProblem(f"serving on {host} without a token gives everyone access", hint=hint)
        _print_address(session, listening, len(tasks.names()), settings.engine_url)
        with _logging(session, access_log=settings.access_log):
            server.serve(listening, tasks, folders, settings)


def _open_tasks(session: Session, bundle: Path | None) -> ServedTasks:
    from icmlora.serving.tasks import open_tasks

    store = None if bundle is not None else session.settings.store.value
    return open_tasks(store, bundle, command=session.command, lock_timeout=session.settings.lock_timeout.value)


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


def _print_config(
    session: Session, engine: EngineName, bundle: Path | None, base_model: str | None, *, gateway: bool
) -> None:
    """Print the environment and the commands that start an engine with the tasks of a store or a bundle."""
    from icmlora.serving.launch import plan_launch

    bundle = None if bundle is None else bundle.resolve()
    store = None if bundle is not None else session.settings.store.value
    launch = plan_launch(_open_tasks(session, bundle), engine, store, bundle, base_model=base_model, gateway=gateway)
    out = session.out
    out.document(
        {
            "engine": engine,
            "base_model": launch.base_model,
            "model": launch.model,
            "environment": dict(launch.environment),
            "commands": [list(command) for command in launch.commands],
            "tasks_count": launch.tasks,
            "max_lora_rank": launch.max_lora_rank,
            "credentials": list(launch.credentials),
            "left_out": [{"task": task, "reason": reason} for task, reason in launch.left_out],
        }
    )
    for name, value in launch.environment.items():
        out.answer(f"export {name}={shlex.quote(value)}")
    for number, words in enumerate(launch.commands, 1):
        out.answer(shlex.join(words) + (" &" if number < len(launch.commands) else ""))
    if launch.credentials:
        out.note("the printed address has no user or password: set PGUSER and PGPASSWORD, or use ~/.pgpass")
        out.note("for a bucket, set AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_REGION, or AWS_PROFILE")
    out.note(f"{counted(launch.tasks, 'task')} of {launch.base_model}; largest rank {launch.max_lora_rank}")
    if not launch.is_local:
        out.warn("the base model is not on this machine, so adapters cannot be checked against it before loading")
        name = shlex.quote(launch.base_model)
        if bundle is not None:
            option = "--model" if engine == "vllm" else "--model-path"
            out.hint(f"download it with `hf download {name}`, or pass its folder to the engine: {option} FOLDER")
        else:
            out.hint(f"run `icm base add {name} PATH` to set its location")
    for task, reason in launch.left_out:
        out.warn(f"{task}: {reason}", kind="left_out", task=task)
