"""The mean vectors of all tasks that can be compared with one, kept in a file between commands. Never imports torch.

    rows of vectors ──stamp──▶ the same as when the file was written ──▶ means as they are
                               others, but all tasks of the file are still there ──▶ means, and those of the new tasks
                               anything else ──▶ all files of vectors are decoded

Decoding ten thousand small files takes seconds, and what `icm show` asks of them is a mean each. The file is in the
cache: whoever deletes or damages it, or kills its writer, loses time alone. Nothing that writes to a store knows of it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self
from zipfile import BadZipFile

import numpy as np

from icmlora.errors import IcmLoraError
from icmlora.fleet.context import Context
from icmlora.fleet.resources.stored_vectors import (
    comparison_key,
    latest_vectors,
    read_comparable,
    rows_to_compare,
    vectors_by_task,
)
from icmlora.io.staging import writing_file
from icmlora.task_vectors.distances import MeanVectors
from registry.names import absolute
from registry.records import TaskRecord, VectorRecord, View

if TYPE_CHECKING:
    from registry.store import Store

_FEWEST = 100  # tasks: decoding fewer takes less than a tenth of a second
_FORMAT = 1  # raised whenever the same rows would give other means, or the file has other fields


@dataclass(frozen=True)
class KnownMeans:
    """The tasks whose vectors one extractor made, and the means of these."""

    names: tuple[str, ...]  # of the tasks, sorted
    vectors: MeanVectors
    rows: tuple[str, ...]  # a digest for each task, of the rows of its vectors
    stamp: str  # of the rows of the whole store

    @classmethod
    def read(cls, path: Path) -> Self | None:
        """Read a file; None if there is none, or it is damaged, which the checksums in it tell."""
        try:
            with path.open("rb") as stream, np.load(stream, allow_pickle=False) as found:
                vectors = MeanVectors(found["means"], found["squares"], int(found["freedom"]))
                return cls(tuple(found["names"].tolist()), vectors, tuple(found["rows"].tolist()), str(found["stamp"]))
        except (OSError, ValueError, KeyError, EOFError, BadZipFile, RuntimeError):  # the last says "encrypted"
            return None

    def write(self, path: Path) -> None:
        """Write it to a file, as a whole or not at all; where that cannot be, nothing is kept."""
        vectors = self.vectors
        with suppress(OSError, IcmLoraError), writing_file(path, force=True) as stream:
            np.savez(
                stream,
                names=np.array(self.names),
                rows=np.array(self.rows),
                stamp=np.array(self.stamp),
                means=vectors.means,
                squares=vectors.squares,
                freedom=np.array(vectors.freedom),
            )


def known_means(
    context: Context, store: Store, task: TaskRecord, vectors: Sequence[VectorRecord], view: View
) -> KnownMeans | None:
    """Return the means of the vectors of all tasks that a task with some `vectors` can be compared with, and its own.

    None if it has no vectors of that view, or they cannot be read.

    Raises:
        DamagedStore: A row of some vectors is wrong.
    """
    own = next((row for row in latest_vectors(vectors) if row.view == view), None)
    if own is None:
        return None
    path = _place(context, task.base_model, view, comparison_key(own.extractor))
    kept, stamp = KnownMeans.read(path), store.listing.vectors_stamp()
    if kept is not None and kept.stamp == stamp and task.name in kept.names:
        return kept
    tasks = list(store.listing.all())
    of_task = vectors_by_task(store)
    rows = {other.name: of_task[other.name] for other in tasks if other.base_model == task.base_model}
    chosen, *_ = rows_to_compare(rows, view, like=task.name)
    found = _updated(store, chosen, kept, stamp)
    if found is None or task.name not in found.names:
        return None
    # What was left out as damaged may be mended, and what another process wrote meanwhile has another stamp.
    is_whole = len(tasks) == store.listing.count() and len(found.names) == len(chosen)
    if is_whole and len(found.names) >= _FEWEST and store.listing.vectors_stamp() == stamp:
        found.write(path)
    return found


def _place(context: Context, base_model: str, view: View, extractor: str) -> Path:
    """Return the path of the file of one store, base model, view and extractor."""
    what = json.dumps([_FORMAT, absolute(context.address), base_model, view, extractor])
    return context.cache / "means" / f"{hashlib.sha256(what.encode()).hexdigest()[:32]}.npz"


def _updated(
    store: Store, chosen: Mapping[str, Sequence[VectorRecord]], kept: KnownMeans | None, stamp: str
) -> KnownMeans | None:
    """Return the means of some tasks, without those that cannot be read; what is kept is not read again."""
    digests = {name: _digest(rows) for name, rows in chosen.items()}
    if kept is not None and not set(kept.rows) <= set(digests.values()):
        kept = None  # the part that a task had in the sums cannot be taken out again
    known = set[str]() if kept is None else set(kept.rows)
    new = {name: rows for name, rows in chosen.items() if digests[name] not in known}
    store.blobs.fetch(row.blob for own in new.values() for row in own)
    vectors, _ = read_comparable(store.blobs.read, new)
    parts = [*([] if kept is None else [kept.vectors]), *([MeanVectors.of(vectors)] if vectors else [])]
    if not parts:
        return None
    order = [*(() if kept is None else kept.rows), *(digests[name] for name in vectors)]
    place_of = {digest: place for place, digest in enumerate(order)}
    names = tuple(name for name in chosen if digests[name] in place_of)
    rows = tuple(digests[name] for name in names)
    return KnownMeans(names, MeanVectors.joined(parts).ordered([place_of[row] for row in rows]), rows, stamp)


def _digest(rows: Sequence[VectorRecord]) -> str:
    """Return a digest of all that the vectors of a task depend on; no two tasks share a row."""
    what = [[row.id, row.blob, row.view, row.support_set] for row in rows]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:32]
