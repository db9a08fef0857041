"""The bill: bytes on disk by what they are for. Every file of the store is counted once, so the total is `du -b`'s."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from registry.row_checks import is_right
from registry.storage.folder import StorePaths
from registry.storage.sqlite import SqliteDatabase

_OF_CURRENT = "generator_id IN (SELECT generators.id FROM generators WHERE is_current AND {right})"
# Use -> a table, its columns that refer to blobs, and which rows; the first that refers to a blob has it.
_USES = (
    ("originals", "adapters", ("config_id", "card_id"), "is_final"),
    ("originals", "adapters", ("weights_id", "initial_id"), "is_final AND evicted_at IS NULL"),
    ("checkpoints", "adapters", ("config_id", "card_id"), "NOT is_final"),
    ("checkpoints", "adapters", ("weights_id", "initial_id"), "NOT is_final AND evicted_at IS NULL"),
    ("generators", "generators", ("blob_id", "start_id"), "is_current"),
    ("residuals", "codes", ("residual_id",), _OF_CURRENT),
    ("codes", "codes", ("blob_id",), _OF_CURRENT),
    ("extras", "extras", ("blob_id",), "TRUE"),
    ("vectors", "task_vectors", ("blob_id",), "TRUE"),
    ("texts", "tasks", ("samples_id", "eval_id"), "TRUE"),
    ("old_generators", "generators", ("blob_id", "start_id"), "TRUE"),
    ("old_generators", "codes", ("blob_id", "residual_id"), f"NOT {_OF_CURRENT}"),
    ("training", "train_runs", ("weights_id", "optimizer_id"), "TRUE"),
)


@dataclass(frozen=True)
class Usage:
    """Bytes of the files of a store. A blob with several uses counts for the first of them, in this order."""

    originals: int  # final adapters: weights, configurations and cards
    checkpoints: int  # the other adapters
    generators: int  # current ones, with their few-shot starts
    residuals: int  # under the current generators
    codes: int  # under the current generators
    extras: int  # heads, tokenizers and whatever else of an adapter is kept as it is
    vectors: int
    texts: int  # samples and held-out texts
    old_generators: int  # not current, with their codes
    training: int  # checkpoints of unfinished runs
    database: int  # the SQLite file and its journal
    unreferenced: int  # blobs that no row refers to, temporary files, quarantine
    overhead: int  # FORMAT, locks and reserve

    @property
    def total(self) -> int:
        """All of them together."""
        return sum(vars(self).values())


def measure(database: SqliteDatabase, listed: Mapping[str, int], paths: StorePaths, *, has_wrong_rows: bool) -> Usage:
    """Add up the files of a store by use. What only a wrong row refers to counts as `unreferenced`.

    `listed` is digest -> bytes of every blob that is there.
    """
    with database.columns() as connection:
        uses = _uses(connection, has_wrong_rows=has_wrong_rows)
    sums = dict.fromkeys(Usage.__dataclass_fields__, 0)
    for digest, size in listed.items():
        sums[uses.get(digest, "unreferenced")] += size
    for folder, _, names in os.walk(paths.root):
        is_of_blobs = Path(folder).is_relative_to(paths.blobs)
        for name in names:
            if not (is_of_blobs and name in listed):
                _add(sums, paths, Path(folder, name))
    return Usage(**sums)


def _add(sums: dict[str, int], paths: StorePaths, path: Path) -> None:
    """Add a file that is no blob to what it is for."""
    try:
        size = path.lstat().st_size
    except FileNotFoundError:
        return  # another process has renamed or removed it since the folder was listed
    # The journal has the name of the database and a suffix.
    if path.name.startswith(paths.database.name):
        sums["database"] += size
    elif path.parent in (paths.root, paths.jobs):
        sums["overhead"] += size
    else:
        sums["unreferenced"] += size


def _uses(connection: sqlite3.Connection, *, has_wrong_rows: bool) -> dict[str, str]:
    """Return digest -> use."""

    def right(table: str) -> str:
        # It takes a call of Python for each row and each use.
        return is_right(table) if has_wrong_rows else "TRUE"

    use_of: dict[int, str] = {}
    for use, table, columns, rows in reversed(_USES):
        condition = f"{rows.format(right=right('generators'))} AND {right(table)}"
        for column in columns:
            query = f"SELECT DISTINCT {column} FROM {table} WHERE {column} IS NOT NULL AND {condition}"  # noqa: S608
            use_of |= dict.fromkeys((number for (number,) in connection.execute(query)), use)
    known = connection.execute(f"SELECT id, digest FROM blobs WHERE {right('blobs')}")  # noqa: S608
    return {digest.hex(): use_of[number] for number, digest in known if number in use_of}
