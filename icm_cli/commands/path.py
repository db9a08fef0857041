"""`icm path`: print where icm keeps something, for scripts."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from icm_cli.config import config_file, log_file
from icm_cli.session import Session, command


class What(StrEnum):
    """The paths that `icm path` prints."""

    STORE = "store"
    DB = "db"
    BLOBS = "blobs"
    CONFIG = "config"
    LOG = "log"


@command
def path(session: Session, what: Annotated[What, typer.Argument(help="Which path to print.")] = What.STORE) -> None:
    """Print the path of the store, its database, its blobs, the configuration file or the log.

    The path need not exist. The configuration file may set store, device and lock_timeout, for example
    `store = "/data/icm"`.

    Example:
      du -sb "$(icm path store)"
    """
    found = _found(session, what)
    session.out.document({"name": what.value, "path": str(found)})
    session.out.answer(str(found))


def _found(session: Session, what: What) -> Path:
    if what is What.CONFIG:
        return config_file()
    if what is What.LOG:
        return log_file()
    store = session.settings.store.value
    return store if what is What.STORE else store / {What.DB: "registry.db", What.BLOBS: "blobs"}[what]
