"""Verify, repair and prune a store, and check the machine that it is on."""

from __future__ import annotations

import os
import platform
import shutil
import sqlite3
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from icmlora.fleet.context import Context, use_case
from icmlora.fleet.tasks.blob_kinds import kind_of
from registry.errors import DamagedStore, RegistryError

if TYPE_CHECKING:
    from icmlora.io.cards import Card
    from registry.records import TaskSummary
    from registry.storage.prune import PruneReport as PruneReport
    from registry.storage.row_repair import RowRepair as RowRepair
    from registry.store import Store
    from registry.verify import Finding as Finding


@use_case
def verify(
    context: Context, tasks: Sequence[str] = (), *, read_data: bool = False, decode: bool = False
) -> Iterator[Finding]:
    """Check the database and the blobs, and yield what is wrong as it is found.

    Args:
        context: The store.
        tasks: Check only what these tasks need; everything if empty.
        read_data: Also read and hash every blob. By default only its presence and length are checked.
        decode: Also decode every code whose original is there, and compare its error with the recorded one.
    """
    with context.open(read_only=True) as store:
        rows_are_wrong = False
        for finding in store.verify(read_data=read_data, names=tasks):
            yield finding
            rows_are_wrong |= finding.kind in ("database", "row")
        if rows_are_wrong:
            return  # what follows believes them
        if read_data:
            from icmlora.fleet.tasks.verify_codes import wrong_kinds

            yield from wrong_kinds(store, tasks)
        if decode:
            from icmlora.fleet.tasks.verify_codes import wrong_errors

            yield from wrong_errors(store, tasks)
        yield from _remarks(store, tasks, with_base_models=read_data)


def _remarks(store: Store, names: Sequence[str], *, with_base_models: bool) -> Iterator[Finding]:
    """Yield which adapters do nothing, and which do not fit their base model where that is on this machine."""
    wanted = {store.tasks.get(name).name for name in names}
    rows = [row for row in store.tasks.summaries() if not wanted or row.task.name in wanted]
    fitted: defaultdict[str, list[TaskSummary]] = defaultdict(list)
    for row in rows:
        if with_base_models and row.final.extras:
            yield from _missed(store, row)
        if row.final.does_nothing:
            yield _remark(row, f"the adapter of {row.task.name} does nothing: {row.final.original_only}")
        elif row.final.layout:
            fitted[row.task.base_model].append(row)
    if with_base_models:
        for label, some in fitted.items():
            yield from _misfits(store, label, some)


def _missed(store: Store, row: TaskSummary) -> Iterator[Finding]:
    from icmlora.errors import BaseModelMismatch, BaseModelNotFound, DataError
    from icmlora.fleet.resources.decoding import check_references

    try:
        check_references(store, row.final)
    except BaseModelMismatch as error:
        yield _remark(row, f"the adapter of {row.task.name} cannot be written from its code: {error.message}")
    except (BaseModelNotFound, DataError, DamagedStore):  # nothing to compare with, or damage that was found already
        return


def _misfits(store: Store, label: str, rows: Sequence[TaskSummary]) -> Iterator[Finding]:
    from icmlora.errors import BaseModelMismatch, BaseModelNotFound
    from icmlora.fleet.context import locate_base

    try:
        found = locate_base(store, label)
        from icmlora.base_models.running.modules import check_fits
        from icmlora.base_models.skeleton import load_skeleton

        base = load_skeleton(found)
    except BaseModelNotFound:  # then there is nothing to compare with
        return
    for row in rows:
        try:
            check_fits(base, row.final.layout)
        except BaseModelMismatch as error:
            yield _remark(row, f"the adapter of {row.task.name} does not fit: {error.message}")


def _remark(row: TaskSummary, text: str) -> Finding:
    from registry.verify import Finding

    return Finding("remark", text, "", tasks=(row.task.name,))


@use_case
def repair_blobs(context: Context) -> list[tuple[Finding, str]]:
    """Move every damaged blob to quarantine, and return its finding and new place. Ingesting restores originals."""
    with context.open() as store:
        return store.repair()


@use_case
def repair_rows(context: Context) -> list[RowRepair]:
    """Correct rows of the database of which a single bit flipped; a copy of it goes to quarantine before.

    Returns:
        What became of each wrong row: the value that was corrected, or the `problem` for which it was left alone.
    """
    with context.open() as store:
        return store.repair_rows()


@use_case
def restore_database(context: Context) -> str:
    """Put the copy of the database that icm kept before the last deletion in its place.

    What was there goes to the folder `quarantine` of the store. What was recorded after the copy is not in it.

    Returns:
        When the copy was made, as RFC 3339.

    Raises:
        DamagedStore: There is no copy, or it is damaged too; nothing was changed.
    """
    from registry.storage.kept import restore_database

    return restore_database(context.path, lock_timeout=context.lock_timeout, command=context.command)


@use_case
def prune(
    context: Context, *, grace: float = 3600.0, empty_quarantine: bool = False, dry_run: bool = False
) -> PruneReport:
    """Delete blobs that no task needs and files that interrupted commands left behind.

    Codes, generators, residuals and weights are moved to the folder `quarantine` of the store instead.

    Args:
        context: The store.
        grace: Seconds; younger files stay, so that a running ingest is safe.
        empty_quarantine: Delete these too, and what is in quarantine.
        dry_run: Only report what would be deleted.
    """
    with context.open(read_only=dry_run) as store:
        return store.prune(grace=grace, is_precious=_is_precious, empty_quarantine=empty_quarantine, dry_run=dry_run)


def _is_precious(start: bytes) -> bool:
    return kind_of(start) in ("code", "generator", "residual", "weights")


_DISTRIBUTIONS = ("icm-lora", "torch", "transformers", "peft", "safetensors", "sqlalchemy", "numpy", "typer")
_LOW_SPACE = 1 << 30  # bytes: less than this does not hold a handful of adapters and a generator


@dataclass(frozen=True)
class Check:
    """One result of `icm doctor`."""

    name: str
    value: str | int | Card | None
    problem: str | None = None


@use_case
def examine(context: Context) -> list[Check]:
    """Check versions, devices, free space and the store, for a problem report."""
    return [*_versions(), *_devices(), *_database_library(), *_store(context)]


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

    from icmlora.io.cards import cuda_cards, has_nvidia_card, install_command, mps_card, nvidia_driver, toolkit

    (cards, problem), mac, driver, built = cuda_cards(), mps_card(), nvidia_driver(), toolkit()
    if driver is not None and built is None:
        fact = f"this machine has {', '.join(driver.cards)}, but this build of torch has no CUDA"
        problem = f"{fact}; `{install_command(driver)}` installs one that has"
    out_of_reach = "none, although there is an NVIDIA card" if has_nvidia_card() else "none"
    return [
        Check("cpu_threads", torch.get_num_threads()),
        Check("cuda", ", ".join(card.name for card in cards.values()) or "none", problem),
        Check("torch_built_for", built or "CPU"),
        Check("nvidia_driver", out_of_reach if driver is None else driver.version),
        *(Check(device, card) for device, card in cards.items()),
        Check("mps", mac or "none"),
    ]


def _database_library() -> list[Check]:
    note = "has the WAL-reset bug, which icm avoids by using the rollback journal"
    suffix = f" ({note})" if has_wal_reset_bug(sqlite3.sqlite_version_info) else ""
    return [Check("sqlite", f"{sqlite3.sqlite_version}{suffix}")]


def has_wal_reset_bug(release: tuple[int, ...]) -> bool:
    """Return whether an SQLite release can corrupt a WAL database: 3.7.0 to 3.51.2, but two have the fix."""
    if (3, 44, 6) <= release < (3, 45) or (3, 50, 7) <= release < (3, 51):
        return False
    return (3, 7, 0) <= release < (3, 51, 3)


def _store(context: Context) -> list[Check]:
    store = context.path
    anchor = next(folder for folder in (store, *store.absolute().parents) if folder.exists())
    free = shutil.disk_usage(anchor).free
    checks = [Check("free_bytes", free, "less than 1 GiB is free" if free < _LOW_SPACE else None)]
    if not os.access(anchor, os.W_OK | os.X_OK):
        checks.append(Check("writable", "no", f"{anchor} cannot be written by this user"))
    if not (store / "FORMAT").exists():
        return [*checks, Check("store", "none yet; `icm ingest` creates it")]
    return [*checks, _opened(context), _schema(store / "registry.db")]


def _opened(context: Context) -> Check:
    """Open the store, and report the error that another command would raise."""
    problem = None
    try:
        with context.open(read_only=True):
            pass
    except RegistryError as error:
        problem = str(error) if error.hint is None else f"{error}; {error.hint}"
    try:
        format_ = (context.path / "FORMAT").read_text(errors="replace").strip()[:80]
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
