"""The mean vectors of all tasks that can be compared with one, kept in a file between commands. Never imports torch.

    nothing was written since the file         means as they are
    manifests changed, no vectors of the file  means, and the means of new tasks
    anything else                              all vectors are decoded

Decoding ten thousand small files takes seconds, and `icm show` needs one mean of each. The file is in the cache: if it
is deleted or damaged, or its writer killed, only time is lost.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Self, cast
from zipfile import BadZipFile

import numpy as np

from icmlora.errors import IcmLoraError
from icmlora.fleet.context import Context
from icmlora.fleet.resources.stored_vectors import comparison_key, latest_vectors, read_comparable
from icmlora.io.staging import writing_file
from icmlora.task_vectors.distances import MeanVectors
from registry.errors import DamagedStore
from registry.filters import Selection
from registry.manifests import Task, Vector, View
from registry.names import absolute

if TYPE_CHECKING:
    from registry.store import Store

_MIN_TASKS = 100  # decoding fewer takes less than a tenth of a second
_FORMAT = 2  # raised whenever the same vectors would give other means, or the file has other fields
_CHUNK = 256  # tasks whose vectors are in memory


@dataclass(frozen=True)
class KnownMeans:
    """The tasks of a base model with vectors, and the means of those that one extractor made."""

    # For each task, sorted by name. The digest is of its comparable vectors, or empty if it has none.
    tasks: tuple[str, ...]
    manifests: tuple[str, ...]
    digests: tuple[str, ...]
    vectors: MeanVectors  # of the tasks that have some
    stamp: str  # of the state of the store

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The tasks that have comparable vectors, in the order of the means."""
        return tuple(name for name, digest in zip(self.tasks, self.digests, strict=True) if digest)

    def has(self, task: Task) -> bool:
        """Return whether the vectors of this state of a task are among the means."""
        manifests = dict(zip(self.tasks, self.manifests, strict=True))
        return manifests.get(task.name) == task.manifest and task.name in self.names

    @classmethod
    def read(cls, path: Path) -> Self | None:
        """Read a file; None if there is none, or if its checksums show damage."""
        try:
            with path.open("rb") as stream, np.load(stream, allow_pickle=False) as found:
                vectors = MeanVectors(found["means"], found["squares"], int(found["freedom"]))
                tasks, manifests, digests = (tuple(found[name].tolist()) for name in ("tasks", "manifests", "digests"))
                return cls(tasks, manifests, digests, vectors, str(found["stamp"]))
        except (OSError, ValueError, KeyError, EOFError, BadZipFile, RuntimeError):  # the last says "encrypted"
            return None

    def write(self, path: Path) -> None:
        """Write it to a file, completely or not at all; nothing is kept if that fails."""
        vectors = self.vectors
        with suppress(OSError, IcmLoraError), writing_file(path, force=True) as stream:
            np.savez(
                stream,
                tasks=np.array(self.tasks),
                manifests=np.array(self.manifests),
                digests=np.array(self.digests),
                stamp=np.array(self.stamp),
                means=vectors.means,
                squares=vectors.squares,
                freedom=np.array(vectors.freedom),
            )


def known_means(context: Context, store: Store, task: Task, view: View) -> KnownMeans | None:
    """Return the mean vectors of a task and of all that it can be compared with.

    None if it has no vectors of that view, if they cannot be read, or if another version of it is current.
    """
    own = next((vector for vector in latest_vectors(task.vectors) if vector.view == view), None)
    if own is None:
        return None
    extractor = comparison_key(own.extractor)
    what = json.dumps([_FORMAT, absolute(context.address), task.base_model, view, extractor])
    path = context.cache / "means" / f"{hashlib.sha256(what.encode()).hexdigest()[:32]}.npz"
    kept, stamp = KnownMeans.read(path), _stamp(store)
    if kept is None or kept.stamp != stamp:
        found, is_complete = _updated(store, task.base_model, view, extractor, kept, stamp)
        # Damaged vectors may be repaired, and another process may have written since.
        if found is not None and is_complete and len(found.names) >= _MIN_TASKS and _stamp(store) == stamp:
            found.write(path)
        kept = found
    return kept if kept is not None and kept.has(task) else None


def _stamp(store: Store) -> str:
    meta = store.parts.database.meta()
    return f"{meta.store} {meta.changes} {meta.seq}"


def _updated(
    store: Store, base_model: str, view: View, extractor: str, kept: KnownMeans | None, stamp: str
) -> tuple[KnownMeans | None, bool]:
    """Return the present means, and whether no task is missing; what `kept` has is not read again."""
    manifests = {row.name: row.manifest for row in store.rows(Selection(base_model=base_model)) if row.vectors}
    digests = {} if kept is None else dict(zip(kept.manifests, kept.digests, strict=True))
    vectors = dict[str, list[Vector]]()
    new = [manifest for manifest in manifests.values() if manifest not in digests]
    store.manifests.fetch(new)
    for manifest in new:
        with suppress(DamagedStore):
            task = cast(Task, store.state(manifest))
            own = [vector for vector in latest_vectors(task.vectors) if vector.view == view]
            is_comparable = bool(own) and comparison_key(own[0].extractor) == extractor
            digests[manifest] = _digest(task.name, own) if is_comparable else ""
            vectors[digests[manifest]] = own
    of_task = {name: digests[manifest] for name, manifest in manifests.items() if manifest in digests}
    known = [] if kept is None else list(filter(None, kept.digests))
    if not set(known) <= set(of_task.values()):  # the part that a task had in the sums cannot be taken out again
        return _updated(store, base_model, view, extractor, None, stamp)
    parts = [] if kept is None else [kept.vectors]
    done = {"", *known}
    todo = [digest for digest in vectors if digest not in done]
    store.blobs.fetch(vector.blob for digest in todo for vector in vectors[digest])
    for at in range(0, len(todo), _CHUNK):
        read, _ = read_comparable(store.blobs.read, {digest: vectors[digest] for digest in todo[at : at + _CHUNK]})
        known += read
        parts += [MeanVectors.of(read)] if read else []
    if not parts:
        return None, False
    places = {digest: place for place, digest in enumerate(known)}
    tasks = sorted(name for name, digest in of_task.items() if not digest or digest in places)
    order = [of_task[name] for name in tasks]
    means = MeanVectors.joined(parts).ordered([places[digest] for digest in order if digest])
    found = KnownMeans(tuple(tasks), tuple(manifests[name] for name in tasks), tuple(order), means, stamp)
    return found, len(tasks) == len(manifests)


def _digest(task: str, vectors: Sequence[Vector]) -> str:
    """Return a digest of all that the mean of a task depends on, and of its name, so that no two are equal."""
    what = [task, *([vector.blob, vector.view, vector.support_set] for vector in vectors)]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:32]
