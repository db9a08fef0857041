"""The bill: bytes by use. Every file is counted once, so the total of a folder is the one of `du -b`."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sqlalchemy import false, select, true

from registry.encoding import files_of, unpacked
from registry.manifests import Task
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
        """All of them together."""
        return sum(getattr(self, name) for name in self.__dataclass_fields__)


def measure(store: Store) -> Usage:
    """Add up the files of a store by use. A manifest that cannot be read counts, its files are `unreferenced`."""
    uses, blobs, manifests = _uses(store), store.blobs.sizes(), store.manifests.sizes()
    sums = dict.fromkeys(Usage.__dataclass_fields__, 0)
    for digest, size in (*blobs.items(), *manifests.items()):
        sums[uses.get(digest, "unreferenced")] += size
    for use, size in store.parts.maintenance.footprint(blobs, manifests)._asdict().items():
        sums[use] += size
    if store.blobs.is_remote:
        sums["unreferenced"] += sum(file.size for file in leftovers(store, aside=True))
    return Usage(**sums)


def _uses(store: Store) -> dict[str, str]:
    """Return the use of each manifest and blob that refs and history reach."""
    refs = select(REFS.c.kind, REFS.c.name, REFS.c.manifest, true())
    history = select(HISTORY.c.kind, HISTORY.c.key.label("name"), HISTORY.c.manifest, false())
    with store.parts.database.read() as connection:
        current = connection.execute(refs).all()
        older = connection.execute(history.where(HISTORY.c.manifest.not_in(select(REFS.c.manifest)))).all()
    rows = [*current, *older]
    store.manifests.fetch(manifest for _, _, manifest, _ in rows)
    files: defaultdict[str, set[str]] = defaultdict(set)
    files["manifests"] = {manifest for _, _, manifest, _ in rows}
    for kind, is_current, body in store.undamaged(rows, lambda row: (row[0], row[3], _body(store, row[2]))):
        for use, file in files_of(body):
            if use == "generators" and (kind == Task.KIND or not is_current):
                use = "old_generators"
            files[use if is_current or use in ("manifests", "old_generators") else "versions"].add(file)
    uses = dict[str, str]()
    for use in reversed(Usage.__dataclass_fields__):
        uses |= dict.fromkeys(files[use], use)
    return uses


def _body(store: Store, digest: str) -> Any:
    body = unpacked(store.manifests.read(digest))
    if vectors := body.get("vectors"):  # most are in one file
        body["vectors"] = list({(one["blob"], one["shared"]): one for one in vectors}.values())
    return body
