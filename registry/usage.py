"""Storage by use, in bytes. Every file counts once, so the total of a folder matches `du -b`."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sqlalchemy import and_, false, select, true

from registry.encoding import unpacked
from registry.manifests import Task
from registry.reachability import leftovers
from registry.tables import HISTORY, REFS, packed_files, start_of, unpacked_files

if TYPE_CHECKING:
    from registry.store import Store


@dataclass(frozen=True)
class Usage:
    """Bytes of a store by use. A blob with several uses counts as the first, in this order."""

    originals: int = 0  # final adapters: weights, configurations and cards
    checkpoints: int = 0  # the other adapters
    generators: int = 0  # current ones, with their few-shot starts
    codes: int = 0
    extras: int = 0  # heads, tokenizers and other parts of adapters that are kept exactly
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
        """The sum of all uses."""
        return sum(getattr(self, name) for name in self.__dataclass_fields__)


def measure(store: Store) -> Usage:
    """Return the bytes of a store by use, from its database, without reading manifests of tasks."""
    uses, named = _uses(store)
    blobs, manifests = store.blobs.sizes(), store.manifests.sizes()
    sums = dict.fromkeys(Usage.__dataclass_fields__, 0)
    for digest, size in blobs.items():
        sums[uses.get(start_of(digest), "unreferenced")] += size
    for digest, size in manifests.items():
        sums["manifests" if digest in named else "unreferenced"] += size
    for use, size in store.parts.maintenance.footprint(blobs, manifests)._asdict().items():
        sums[use] += size
    if store.blobs.is_remote:
        sums["unreferenced"] += sum(file.size for file in leftovers(store, aside=True))
    return Usage(**sums)


def _uses(store: Store) -> tuple[dict[bytes, str], set[str]]:
    """Return the use of each blob that refs and history reach, and the manifests that they name."""
    same = and_(HISTORY.c.kind == REFS.c.kind, HISTORY.c.key == REFS.c.key, HISTORY.c.version == REFS.c.version)
    refs = select(REFS.c.kind, REFS.c.name, REFS.c.manifest, true(), HISTORY.c.files).outerjoin_from(
        REFS, HISTORY, same
    )
    history = select(HISTORY.c.kind, HISTORY.c.key.label("name"), HISTORY.c.manifest, false(), HISTORY.c.files)
    with store.parts.database.read() as connection:
        rows = list(connection.execute(refs))
        rows += connection.execute(history.where(HISTORY.c.manifest.not_in(select(REFS.c.manifest))))

    def read(row: Any) -> tuple[str, bool, list[tuple[str, bytes]]]:
        kind, _, manifest, is_current, files = row
        if files is None:  # of a base model or a run
            files = packed_files(unpacked(store.manifests.read(manifest)))
        return kind, is_current, list(unpacked_files(files))

    blobs: defaultdict[str, set[bytes]] = defaultdict(set)
    for kind, is_current, files in store.undamaged(rows, read):
        for use, start in files:
            if use == "generators" and (kind == Task.KIND or not is_current):
                use = "old_generators"
            blobs[use if is_current or use in ("manifests", "old_generators") else "versions"].add(start)
    uses = dict[bytes, str]()
    for use in reversed(Usage.__dataclass_fields__):
        uses |= dict.fromkeys(blobs[use], use)
    return uses, {row.manifest for row in rows}
