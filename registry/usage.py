"""The bill: bytes on disk by what they are for. Every file of the store is counted once, so the total is `du -b`'s."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import ColumnElement, and_, select, true
from sqlalchemy.orm import Session

from registry.row_checks import is_right
from registry.schema import Adapter, Base, Blob, Code, Extra, Generator, Task, TaskVector, TrainRun
from registry.storage.blobs.content import Blobs
from registry.storage.database import Database
from registry.storage.folder import StorePaths
from registry.storage.prune import blob_references
from registry.storage.row_writer import table_of


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


def measure(database: Database, blobs: Blobs, paths: StorePaths, *, has_wrong_rows: bool) -> Usage:
    """Add up the files of a store by use. What only a wrong row refers to counts as `unreferenced`."""
    with database.read() as session:
        uses = _uses(session, has_wrong_rows=has_wrong_rows)
    sums = dict.fromkeys(Usage.__dataclass_fields__, 0)
    listed = {blob.digest: blob.size for blob in blobs.all()}
    for digest, size in listed.items():
        sums[uses.get(digest, "unreferenced")] += size
    for path in (Path(folder, name) for folder, _, names in os.walk(paths.root) for name in names):
        if path.is_relative_to(paths.blobs) and path.name in listed:
            continue
        try:
            size = path.lstat().st_size
        except FileNotFoundError:
            continue  # another process has renamed or removed it since the folder was listed
        # The journal has the name of the database and a suffix.
        if path.name.startswith(paths.database.name):
            sums["database"] += size
        elif path.parent in (paths.root, paths.jobs):
            sums["overhead"] += size
        else:
            sums["unreferenced"] += size
    return Usage(**sums)


def _uses(session: Session, *, has_wrong_rows: bool) -> dict[str, str]:
    """Return digest -> use; the later entries of the list give way to the earlier ones."""

    def right(owner: type[Base], *conditions: ColumnElement[bool]) -> ColumnElement[bool]:
        # It takes a call of Python for each row and each use.
        return and_(*conditions, is_right(table_of(owner)) if has_wrong_rows else true())

    def refers(owner: type[Base], *conditions: ColumnElement[bool]) -> ColumnElement[bool]:
        return blob_references(owner, right(owner, *conditions))

    of_current = Code.generator_id.in_(select(Generator.id).where(right(Generator, Generator.is_current.is_(True))))
    conditions: list[tuple[str, ColumnElement[bool]]] = [
        ("originals", refers(Adapter, Adapter.is_final.is_(True))),
        ("checkpoints", refers(Adapter)),
        ("generators", refers(Generator, Generator.is_current.is_(True))),
        (
            "residuals",
            Blob.id.in_(select(Code.residual_id).where(right(Code, Code.residual_id.is_not(None), of_current))),
        ),
        ("codes", refers(Code, of_current)),
        ("extras", refers(Extra)),
        ("vectors", refers(TaskVector)),
        ("texts", refers(Task)),
        ("old_generators", refers(Generator)),
        ("old_generators", refers(Code)),
        ("training", refers(TrainRun)),
    ]
    uses: dict[str, str] = {}
    for use, condition in reversed(conditions):
        found = select(Blob.digest).where(right(Blob, condition))
        uses |= dict.fromkeys(session.scalars(found), use)
    return uses
