"""The bill: bytes by what they are for. Every file is counted once, so of a folder the total is `du -b`'s."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sqlalchemy import select

from registry.manifests import files_of, unpacked
from registry.reachability import leftovers
from registry.tables import HISTORY, REFS

if TYPE_CHECKING:
    from registry.store import Store


@dataclass(frozen=True)
class Usage:
    """Bytes of the files of a store. A blob with several uses counts for the first of them, in this order."""

    originals: int = 0  # final adapters: weights, configurations and cards
    checkpoints: int = 0  # the other adapters
    generators: int = 0  # current ones, with their few-shot starts
    codes: int = 0
    extras: int = 0  # heads, tokenizers and whatever else of an adapter is kept as it is
    vectors: int = 0
    texts: int = 0  # samples and held-out texts
    versions: int = 0  # files that only earlier versions of tasks need
    old_generators: int = 0  # not current; codes may still need them
    training: int = 0  # checkpoints of unfinished runs
    manifests: int = 0  # descriptions of all of this
    database: int = 0  # the SQLite file and its journal, or the tables on a server
    unreferenced: int = 0  # files that no ref reaches, temporary files, quarantine
    overhead: int = 0  # FORMAT, locks and reserve of a folder

    @property
    def total(self) -> int:
        """All of them together."""
        return sum(getattr(self, name) for name in self.__dataclass_fields__)


def measure(store: Store) -> Usage:
    """Add up the files of a store by use."""
    order, use_of = {name: place for place, name in enumerate(Usage.__dataclass_fields__)}, dict[str, str]()
    for use, digest in _uses(store):
        if order[use] < order.get(use_of.get(digest, ""), len(order)):
            use_of[digest] = use
    blobs = {blob.digest: blob.size for blob in store.blobs.all()}
    manifests = {one.digest: one.size for one in store.manifests.all()}
    sums = dict.fromkeys(order, 0)
    for digest, size in (*blobs.items(), *manifests.items()):
        sums[use_of.get(digest, "unreferenced")] += size
    for use, size in store.parts.maintenance.footprint(blobs, manifests)._asdict().items():
        sums[use] += size
    if store.blobs.is_remote:
        sums["unreferenced"] += sum(file.size for file in leftovers(store, aside=True))
    return Usage(**sums)


def _uses(store: Store) -> Iterator[tuple[str, str]]:
    """Yield use and digest of all manifests and blobs that refs and history reach."""
    with store.parts.database.read() as connection:
        refs = connection.execute(select(REFS.c.kind, REFS.c.manifest)).all()
        history = connection.execute(select(HISTORY.c.kind, HISTORY.c.manifest)).all()
    current = {digest for _, digest in refs}
    store.manifests.fetch(current)
    for kind, digest in (*refs, *(row for row in history if row[1] not in current)):
        yield "manifests", digest
        is_current = digest in current
        for use, file in files_of(_body(store, digest)):
            if use == "generators" and (kind == "task" or not is_current):
                yield "old_generators", str(file)
            else:
                yield use if is_current or use == "manifests" else "versions", str(file)


def _body(store: Store, digest: str) -> Any:
    return unpacked(store.manifests.read(digest))
