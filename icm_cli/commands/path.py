"""`icm path`: print one path, for scripts."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from icm_cli.session import Session, command


class What(StrEnum):
    """The paths that icm knows."""

    STORE = "store"
    DB = "db"
    BLOBS = "blobs"
    CONFIG = "config"
    LOG = "log"


@command
def path(session: Session, what: Annotated[What, typer.Argument(help="Which path to print.")] = What.STORE) -> None:
    """Print where something is, whether it exists or not.

    The configuration file may set store, device and lock_timeout, as in: store = "/data/icm"

    Example:
      du -sb "$(icm path store)"
    """
    settings = session.settings
    store = settings.store.value
    found = {
        What.STORE: store,
        What.DB: store / "registry.db",
        What.BLOBS: store / "blobs",
        What.CONFIG: settings.config_file,
        What.LOG: settings.log_file,
    }[what]
    session.out.document({"name": what.value, "path": str(found)})
    session.out.answer(str(found))
