"""The bill: bytes by what they are for. Every file is counted once, so of a folder the total is `du -b`'s."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from registry.storage.database import Columns, Database
from registry.storage.folder import Upkeep

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
_TABLES = {"blobs", *(table for _, table, _, _ in _USES)}


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
    database: int  # the SQLite file and its journal, or what the tables take on a server
    unreferenced: int  # blobs that no row refers to, temporary files, quarantine
    overhead: int  # FORMAT, locks and reserve of a folder

    @property
    def total(self) -> int:
        """All of them together."""
        return sum(vars(self).values())


def measure(database: Database, listed: Mapping[str, int], upkeep: Upkeep, *, has_wrong_rows: bool) -> Usage:
    """Add up the files of a store by use. What only a wrong row refers to counts as `unreferenced`.

    `listed` is digest -> bytes of every blob that is there.
    """
    with database.columns() as columns:
        uses = _uses(columns, has_wrong_rows=has_wrong_rows)
    sums = dict.fromkeys(Usage.__dataclass_fields__, 0)
    for digest, size in listed.items():
        sums[uses.get(digest, "unreferenced")] += size
    for use, size in upkeep.footprint(listed)._asdict().items():
        sums[use] += size
    return Usage(**sums)


def _uses(columns: Columns, *, has_wrong_rows: bool) -> dict[str, str]:
    """Return digest -> use."""
    # It takes a call of Python for each row.
    right = {table: columns.right_rows(table) if has_wrong_rows else "TRUE" for table in _TABLES}
    use_of: dict[int, str] = {}
    for use, table, references, rows in reversed(_USES):
        condition = f"{rows.format(right=right['generators'])} AND {right[table]}"
        for column in references:
            query = f"SELECT DISTINCT {column} FROM {table} WHERE {column} IS NOT NULL AND {condition}"  # noqa: S608
            use_of |= dict.fromkeys((number for (number,) in columns.stream(query)), use)
    known = columns.stream(f"SELECT id, digest FROM blobs WHERE {right['blobs']}")  # noqa: S608
    return {digest.hex(): use_of[number] for number, digest in known if number in use_of}
