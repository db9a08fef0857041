"""What `icm doctor` finds out about the machine and the store."""

from __future__ import annotations

import os
import platform
import shutil
import sqlite3
from contextlib import closing
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from icm_cli.workflows.opening import Place

_DISTRIBUTIONS = ("icm-lora", "torch", "transformers", "peft", "safetensors", "sqlalchemy", "numpy", "typer")
_LOW_SPACE = 1 << 30  # bytes: less than this does not hold a handful of adapters and a generator


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: What was looked at, as a JSON key.
        value: What was found.
        problem: What is wrong with it, or None.
    """

    name: str
    value: str | int | None
    problem: str | None = None


def examine(place: Place) -> list[Check]:
    """Look at versions, devices and the store, which is opened to be read, as other commands open it."""
    return [*_versions(), *_devices(), *_database_library(), *_store(place)]


def _versions() -> list[Check]:
    found = [Check("python", platform.python_version()), Check("platform", platform.platform())]
    for name in _DISTRIBUTIONS:
        try:
            found.append(Check(name, version(name)))
        except PackageNotFoundError:
            found.append(Check(name, None, "not installed"))
    return found


def _devices() -> list[Check]:
    import torch

    cuda = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return [
        Check("cpu_threads", torch.get_num_threads()),
        Check("cuda", ", ".join(cuda) or "none"),
        Check("mps", "available" if torch.backends.mps.is_available() else "none"),
    ]


def _database_library() -> list[Check]:
    note = "has the WAL-reset bug, which icm avoids by using the rollback journal"
    suffix = f" ({note})" if has_wal_reset_bug(sqlite3.sqlite_version_info) else ""
    return [Check("sqlite", f"{sqlite3.sqlite_version}{suffix}")]


def has_wal_reset_bug(release: tuple[int, ...]) -> bool:
    """Say whether an SQLite release can corrupt a WAL database: 3.7.0 to 3.51.2, but for two backports of the fix."""
    if (3, 44, 6) <= release < (3, 45) or (3, 50, 7) <= release < (3, 51):
        return False
    return (3, 7, 0) <= release < (3, 51, 3)


def _store(place: Place) -> list[Check]:
    store = place.path
    anchor = next(folder for folder in (store, *store.absolute().parents) if folder.exists())
    free = shutil.disk_usage(anchor).free
    checks = [Check("free_bytes", free, "less than 1 GiB is free" if free < _LOW_SPACE else None)]
    if not os.access(anchor, os.W_OK | os.X_OK):
        checks.append(Check("writable", "no", f"{anchor} cannot be written by this user"))
    if not (store / "FORMAT").exists():
        return [*checks, Check("store", "none yet; `icm ingest` makes it")]
    return [*checks, _opened(place), _schema(store / "registry.db")]


def _opened(place: Place) -> Check:
    """Open the store: what another command would refuse to work with is a problem, in the same words."""
    from registry.errors import RegistryError

    problem = None
    try:
        with place.open(read_only=True):
            pass
    except RegistryError as error:
        problem = str(error) if error.hint is None else f"{error}; {error.hint}"
    try:
        format_ = (place.path / "FORMAT").read_text(errors="replace").strip()[:80]
    except OSError:
        format_ = None
    return Check("store", format_, problem)


def _schema(database: Path) -> Check:
    try:
        with closing(sqlite3.connect(f"{database.absolute().as_uri()}?mode=ro", uri=True)) as connection:
            (schema,) = connection.execute("PRAGMA user_version").fetchone()
            (verdict,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    except sqlite3.Error as error:
        return Check("schema", None, f"the database cannot be read: {error}")
    return Check("schema", schema, None if verdict == "ok" else f"the database is damaged: {verdict}")
