"""Check the machine and the store, for a problem report: `icm doctor`."""

from __future__ import annotations

import os
import platform
import shutil
import sqlite3
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from icmlora.fleet.context import Context, use_case
from registry.errors import RegistryError, StoreNotFound
from registry.names import DatabaseUrl

if TYPE_CHECKING:
    from icmlora.io.cards import Card

_DISTRIBUTIONS = ("icm-lora", "torch", "transformers", "peft", "safetensors", "sqlalchemy", "numpy", "typer")
_MIN_SPACE = 1 << 30  # bytes: enough for a few adapters and a generator


@dataclass(frozen=True)
class Check:
    """One result of `icm doctor`."""

    name: str
    value: str | int | Card | None
    problem: str | None = None


@use_case
def examine(context: Context) -> list[Check]:
    """Check versions, devices, settings and the store.

    The exit code is 1 if a check fails. Include the output in bug reports. The store is not modified. The configuration
    file can set store, device and lock_timeout, for example `store = "/data/icm"`.

    Example:
      icm doctor --json
      du -sb "$(icm doctor --path store)"
    """
    found = [Check("python", platform.python_version()), Check("platform", platform.platform())]
    for name in _DISTRIBUTIONS:
        try:
            found.append(Check(name, version(name)))
        except PackageNotFoundError:
            found.append(Check(name, None, "not installed"))
    note = " (has the WAL-reset bug, which icm avoids by using the rollback journal)"
    suffix = note if has_wal_reset_bug(sqlite3.sqlite_version_info) else ""
    return [*found, *_devices(), Check("sqlite", f"{sqlite3.sqlite_version}{suffix}"), *_store(context)]


def _devices() -> list[Check]:
    import torch

    from icmlora.io.cards import cuda_cards, has_nvidia_card, install_command, mps_card, nvidia_driver, toolkit

    (cards, problem), mac, driver, built = cuda_cards(), mps_card(), nvidia_driver(), toolkit()
    if driver is not None and built is None:
        fact = f"this machine has {', '.join(driver.cards)}, but this build of torch has no CUDA"
        problem = f"{fact}; run `{install_command(driver)}` to install one with CUDA"
    out_of_reach = "none, although this machine has an NVIDIA card" if has_nvidia_card() else "none"
    return [
        Check("cpu_threads", torch.get_num_threads()),
        Check("cuda", ", ".join(card.name for card in cards.values()) or "none", problem),
        Check("torch_built_for", built or "CPU"),
        Check("nvidia_driver", out_of_reach if driver is None else driver.version),
        *(Check(device, card) for device, card in cards.items()),
        Check("mps", mac or "none"),
    ]


def has_wal_reset_bug(release: tuple[int, ...]) -> bool:
    """Return whether an SQLite release can corrupt a WAL database: 3.7.0 to 3.51.2, but two have the fix."""
    if (3, 44, 6) <= release < (3, 45) or (3, 50, 7) <= release < (3, 51):
        return False
    return (3, 7, 0) <= release < (3, 51, 3)


def _store(context: Context) -> list[Check]:
    if isinstance(context.address, DatabaseUrl):
        return _on_server(context, context.address)
    store = context.address
    anchor = next(folder for folder in (store, *store.absolute().parents) if folder.exists())
    free = shutil.disk_usage(anchor).free
    checks = [Check("free_bytes", free, "less than 1 GiB is free" if free < _MIN_SPACE else None)]
    if not os.access(anchor, os.W_OK | os.X_OK):
        checks.append(Check("writable", "no", f"{anchor} cannot be written by this user"))
    if not (store / "FORMAT").exists():
        return [*checks, Check("store", "none yet; run `icm ingest` to create it")]
    try:
        format_ = (store / "FORMAT").read_text(errors="replace").strip()[:80]
    except OSError:
        format_ = None
    return [*checks, *_opened(context, format_)]


def _on_server(context: Context, url: DatabaseUrl) -> list[Check]:
    try:
        from registry.storage.server import examine_server
    except ImportError as error:
        return [Check("postgresql", None, f"{error}; install the extra: pip install 'icm-lora[team]'")]
    try:
        server = examine_server(url, context.command)
    except RegistryError as error:
        return [Check("postgresql", None, _message(error))]
    pooled = "the pool uses a new session for each transaction, which breaks icm's locks; use the server's own address"
    return [
        Check("postgresql", server.version),
        Check("data_checksums", "on" if server.has_checksums else "off"),
        Check("session", "of a pool" if server.is_pooled else "its own", pooled if server.is_pooled else None),
        *_opened(context, str(url)),
    ]


def _opened(context: Context, shown: str | None) -> list[Check]:
    """Open the store and check its database; report the error that another command would raise."""
    from registry.tables import REPAIR_HINT  # imports SQLAlchemy

    try:
        with context.open(read_only=True) as store:
            store.changes()
            facts = list(store.parts.database.damage())
            damage = f"the database is damaged: {facts[0]}; {REPAIR_HINT}" if facts else None
            checks = [Check("store", shown), Check("database", "damaged" if facts else "ok", damage)]
            if not store.blobs.is_remote:
                return checks
            try:
                store.blobs.now()  # it writes and reads
            except RegistryError as error:
                return [*checks, Check("blobs", store.blobs.home, _message(error))]
            return [*checks, Check("blobs", store.blobs.home)]
    except StoreNotFound:
        return [Check("store", "none yet; run `icm init` to create it")]
    except RegistryError as error:
        return [Check("store", shown, _message(error))]


def _message(error: RegistryError) -> str:
    return str(error) if error.hint is None else f"{error}; {error.hint}"
