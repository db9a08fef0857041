"""`icm doctor`: check the installation and the store, and print paths."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from icm_cli.command import plain_command as command
from icm_cli.config import config_file, log_file
from icm_cli.errors import ExitCode
from icm_cli.options import option
from icm_cli.session import Session
from icmlora.io.text import human_size

if TYPE_CHECKING:
    from icmlora.io.cards import Card

What = Literal["store", "db", "blobs", "config", "log"]
PathOpt = Annotated[
    What | None,
    option(
        "--path",
        "Print only the path of the store, its database, its blobs, the configuration file or the log. For "
        "scripts. The path may not exist.",
    ),
]


@command
def doctor(session: Session, path: PathOpt = None) -> None:
    """Check versions, devices, settings and the store.

    The exit code is 1 if a check fails. Include the output in bug reports. The store is not modified. The configuration
    file can set store, device and lock_timeout, for example `store = "/data/icm"`.

    Example:
      icm doctor --json
      du -sb "$(icm doctor --path store)"
    """
    if path is not None:
        found = _path_of(session, path)
        session.out.document({"name": path, "path": str(found)})
        session.out.answer(str(found))
        return
    from icmlora.fleet.tasks.doctor import examine

    settings = session.settings
    checks = examine(session.context)
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


def _path_of(session: Session, what: What) -> Path:
    """Return the path of the store, its database, its blobs, the configuration file or the log."""
    if what == "config":
        return config_file()
    if what == "log":
        return log_file()
    return session.context.path / {"store": "", "db": "registry.db", "blobs": "blobs"}[what]


def _shown(name: str, value: str | int | Card | None) -> str:
    if value is None:
        return "-"
    if isinstance(value, str | int):
        return human_size(value) if name == "free_bytes" and isinstance(value, int) else str(value)
    free = "" if value.free_bytes is None else f", {human_size(value.free_bytes)} free"
    return f"{value.name}: {human_size(value.memory_bytes)}{free}, {'bfloat16' if value.bfloat16 else 'no bfloat16'}"
