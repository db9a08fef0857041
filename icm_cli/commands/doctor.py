"""`icm doctor`: check the installation and the store, and print paths."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from icm_cli.command import Call, command
from icm_cli.config import config_file, log_file
from icm_cli.errors import ExitCode
from icm_cli.session import Session
from icmlora.fleet.params import Param
from icmlora.fleet.tasks.doctor import Check, examine
from icmlora.io.text import human_size

if TYPE_CHECKING:
    from icmlora.io.cards import Card

PathOpt = Annotated[
    Literal["store", "db", "blobs", "config", "log"] | None,
    Param(
        "Print only the path of the store, its database, its blobs, the configuration file or the log. For "
        "scripts. The path may not exist.",
        "--path",
    ),
]


@command(examine)
def doctor(session: Session, call: Call[list[Check]], path: PathOpt = None) -> None:
    if path is not None:
        if path == "config":
            found = config_file()
        elif path == "log":
            found = log_file()
        else:
            found = session.context.path / {"store": "", "db": "registry.db", "blobs": "blobs"}[path]
        session.out.document({"name": path, "path": str(found)})
        session.out.answer(str(found))
        return
    settings = session.settings
    checks = call.now()
    problems = [check for check in checks if check.problem is not None]
    configured = {
        "store": (str(session.context.address), settings.store.source),
        "device": (settings.device.value, settings.device.source),
        "lock_timeout": (settings.lock_timeout.value, settings.lock_timeout.source),
    }
    session.out.document(
        {
            "ok": not problems,
            "settings": {name: {"value": value, "source": source} for name, (value, source) in configured.items()},
            "checks": {check.name: {"value": asdict(check)["value"], "problem": check.problem} for check in checks},
        }
    )
    session.out.record([(name, f"{value} ({source})") for name, (value, source) in configured.items()])
    session.out.line()
    session.out.record([(check.name, _shown(check.name, check.value)) for check in checks])
    for check in problems:
        session.out.warn(f"{check.name}: {check.problem}", kind=check.name)
    if problems:
        raise typer.Exit(ExitCode.FAILED)


def _shown(name: str, value: str | int | Card | None) -> str:
    if value is None:
        return "-"
    if isinstance(value, str | int):
        return human_size(value) if name == "free_bytes" and isinstance(value, int) else str(value)
    free = "" if value.free_bytes is None else f", {human_size(value.free_bytes)} free"
    return f"{value.name}: {human_size(value.memory_bytes)}{free}, {'bfloat16' if value.bfloat16 else 'no bfloat16'}"
