"""What may be deleted: all that no ref reaches.

    refs, history ──▶ manifests ──▶ blobs          reached
    manifests/ ──▶ states newer than the refs      reached too: the database is older than they are
    anything else                                  garbage

`prune`, `evict` and `rm` share one walk. It reads every manifest and compares it with the database. If they disagree,
nothing is deleted.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sqlalchemy import delete, select

from registry.errors import DamagedStore, StoreLocked
from registry.files import failpoint
from registry.manifests import Generator, Removed, State, files_of, unpacked
from registry.storage.blobs.backend import BlobInfo, Leftover
from registry.tables import HISTORY, index_of, key_of

if TYPE_CHECKING:
    from registry.store import Store

Name = tuple[str, str]
"""Kind and key of a ref."""
REPAIR = "run `icm verify --repair` to rebuild the database from the manifests"


@dataclass(frozen=True)
class Found:
    """A manifest that no ref reaches."""

    info: BlobInfo
    name: Name
    seq: int
    number: int
    is_removal: bool
    body: Any


@dataclass
class Walk:
    """All manifests of a store, and what follows from them."""

    reached: set[str] = field(default_factory=set)  # digests of manifests and blobs
    disagreements: list[str] = field(default_factory=list)  # facts that database and manifests state differently
    missing: dict[str, list[str]] = field(default_factory=dict)  # manifests that cannot be read -> what they describe
    newer: list[Found] = field(default_factory=list)  # states that the database does not know
    garbage: list[Found] = field(default_factory=list)  # oldest first
    unreadable: list[BlobInfo] = field(default_factory=list)  # manifests that nothing names and that are damaged
    idle_generators: dict[tuple[str, int], str] = field(default_factory=dict)  # (base model, number) -> manifest

    def check(self, place: str) -> None:
        """Raise `DamagedStore` if the database disagrees with the manifests."""
        facts = [
            *self.disagreements,
            *(f"{what[0]}: manifest {one} is unreadable" for one, what in self.missing.items()),
        ]
        if facts:
            fact = f"{place}: {facts[0]}; icm deletes nothing until this is repaired"
            raise DamagedStore(fact, path=place, hint=REPAIR)


def walk(store: Store) -> Walk:
    """Read all manifests of a store and compare them with its database. The caller holds the store alone."""
    found = Walk()
    newest, used = dict[Name, int](), set[str]()
    generators = dict[tuple[str, int], State]()
    current = dict[Name, tuple[int, str]]()
    for row in store.refs():
        name = row["kind"], row["key"]
        current[name] = row["version"], row["manifest"]
        state = _state(store, found, row["manifest"], name)
        if state is None:
            continue
        newest[name] = state.seq
        if index_of(state, row["manifest"]) != row:
            wrong = [column for column, value in index_of(state, row["manifest"]).items() if row[column] != value]
            found.disagreements.append(f"{', '.join(wrong)} of {row['kind']} {row['name']!r} differ from its manifest")
    with store.parts.database.read() as connection:
        history = connection.execute(select(HISTORY).order_by(HISTORY.c.kind, HISTORY.c.key)).all()
    for kind, key, number, digest in history:
        name = kind, key
        if name not in current:
            found.disagreements.append(f"{kind} {key!r} has a history and no ref")
        elif number == current[name][0] and digest != current[name][1]:
            found.disagreements.append(f"the history of {kind} {key!r} has another current manifest")
        state = _state(store, found, digest, name)
        if state is None:
            continue
        if (state.KIND, key_of(kind, state.ref), state.number) != (kind, key, number):
            found.disagreements.append(f"the history of {kind} {key!r} names a manifest of {state.KIND} {state.ref!r}")
        if isinstance(state, Generator):
            generators[state.base_model, state.number] = state
    in_history = {(kind, key, number) for kind, key, number, _ in history}
    for (kind, key), (number, _) in current.items():
        if kind in ("task", "generator") and (kind, key, number) not in in_history:
            found.disagreements.append(f"version {number} of {kind} {key!r} is not in its history")
    _sort_rest(store, found, newest)
    for body in _bodies(store, found):
        for use, file in files_of(body):
            found.reached.add(str(file))
            if use == "generators" and body["type"].startswith("task/"):
                used.add(str(file))
    found.idle_generators = {
        name: str(state.manifest)
        for name, state in generators.items()
        if current.get(("generator", name[0]), (0, ""))[0] != state.number
        and isinstance(state, Generator)
        and state.blob not in used
    }
    return found


def _state(store: Store, found: Walk, digest: str, name: Name) -> State | None:
    found.reached.add(digest)
    try:
        return store.state(digest)
    except DamagedStore:
        found.missing.setdefault(digest, []).append(f"{name[0]} {name[1]!r}")
        return None


def _sort_rest(store: Store, found: Walk, newest: dict[Name, int]) -> None:
    """Sort the manifests that no ref reaches into newer states and garbage."""
    rest = defaultdict[Name, list[Found]](list)
    for info in store.manifests.all():
        if info.digest in found.reached:
            continue
        try:
            rest_of = _found(info, store.manifests.read(info.digest))
        except (DamagedStore, KeyError, TypeError, ValueError, AttributeError):
            found.unreadable.append(info)
            continue
        rest[rest_of.name].append(rest_of)
    for name, states in rest.items():
        states.sort(key=lambda one: one.seq)
        last = max([newest.get(name, -1), *(one.seq for one in states if one.is_removal)])
        for one in states:
            (found.newer if one.seq > last else found.garbage).append(one)
        # While an earlier state is left, the removal must be there to say that it does not count.
    found.garbage.sort(key=lambda one: (one.is_removal, one.seq))


def _found(info: BlobInfo, data: bytes) -> Found:
    body = unpacked(data)
    kind = body["type"].split("/")[0]
    is_removal = kind == Removed.KIND
    name = body["name"] if kind in ("task", "base", "removed") else body["base_model"]
    kind = body["of"] if is_removal else kind
    return Found(info, (kind, key_of(kind, name)), body["seq"], body.get("version", 1), is_removal, body)


def _bodies(store: Store, found: Walk) -> Iterator[Any]:
    """Yield the JSON of all manifests that count."""
    newer = {one.info.digest: one.body for one in found.newer}
    for digest in [*found.reached]:
        if digest not in found.missing:
            yield unpacked(store.manifests.read(digest))
    found.reached.update(newer)
    yield from newer.values()


@dataclass(frozen=True)
class PruneReport:
    """What prune deleted, or would delete."""

    blobs: int
    manifests: int
    temporary_files: int  # left by killed commands, and what quarantine held if that was asked for
    freed_bytes: int
    young: int = 0  # files that stay for now: a running command may be about to refer to them
    young_bytes: int = 0
    unlisted: tuple[str, ...] = ()  # names with states that the database does not know; nothing of them is deleted
    folders: tuple[str, ...] = ()  # found among the temporary files or in quarantine; they stay


def free(store: Store, files: Iterable[str], names: Iterable[str]) -> int | None:
    """Delete blobs and earlier states of tasks that nothing reaches; see `Store.free`."""
    try:
        with store.exclusive():
            found = walk(store)
            found.check(store.parts.database.place)
            keys = {key_of("task", name) for name in names}
            states = [one for one in found.garbage if one.name[0] == "task" and one.name[1] in keys]
            doomed = {str(file) for file in files} | {str(file) for one in states for _, file in _needed(one)}
            freed = _delete_states(store, states)
            freed += store.blobs.delete(sorted(doomed - found.reached))
            store.parts.maintenance.after_deletion()
    except StoreLocked:
        return None
    return freed


def _delete_states(store: Store, states: Sequence[Found], newest: float | None = None) -> int:
    """Delete manifests and return the bytes freed: before their blobs, and removals last.

    So a state that lacks its blobs, or that was removed, does not come back if the database is lost.
    """
    freed = 0
    for is_removal in (False, True):
        digests = [one.info.digest for one in states if one.is_removal == is_removal]
        freed += store.manifests.delete(digests, newest=newest)
        failpoint("manifests-deleted")
    return freed


def _needed(one: Found) -> Iterable[tuple[str, str]]:
    return () if one.is_removal else files_of(one.body)


def prune(store: Store, *, grace: float | None, empty_quarantine: bool, dry_run: bool) -> PruneReport:
    """Delete garbage; see `Store.prune`."""
    if dry_run:
        return _prune(store, grace, empty_quarantine, dry_run=True)
    with store.exclusive():
        report = _prune(store, grace, empty_quarantine, dry_run=False)
        store.parts.maintenance.after_deletion()
    return report


def _prune(store: Store, grace: float | None, empty_quarantine: bool, *, dry_run: bool) -> PruneReport:
    blobs, manifests, maintenance = store.blobs, store.manifests, store.parts.maintenance
    newest = blobs.now() - (blobs.grace if grace is None else grace)
    found = walk(store)
    found.check(store.parts.database.place)
    if not dry_run and found.idle_generators:
        maintenance.run(lambda: _forget(store, found.idle_generators))
        found = walk(store)
    states = [one for one in found.garbage if one.info.modified <= newest]
    stale = [blob for blob in blobs.all() if blob.digest not in found.reached]
    doomed = [blob for blob in stale if blob.modified <= newest]
    young = [one for one in stale if one.modified > newest]
    left = leftovers(store) + (leftovers(store, aside=True) if empty_quarantine else [])
    temporary = [file for file in left if file.modified <= newest and not file.is_folder]
    if not dry_run:
        _delete_states(store, states, newest)
        blobs.delete((blob.digest for blob in doomed), newest=newest)
        for file in temporary:
            file.remove()
    freed = sum(one.info.size for one in states) + sum(blob.size for blob in doomed)
    return PruneReport(
        blobs=len(doomed),
        manifests=len(states),
        temporary_files=len(temporary),
        freed_bytes=freed + sum(file.size for file in temporary),
        young=len(young) + len(found.garbage) - len(states),
        young_bytes=sum(blob.size for blob in young),
        unlisted=tuple(sorted({one.name[1] for one in found.newer})),
        folders=tuple(file.place for file in left if file.is_folder),
    )


def _forget(store: Store, generators: Iterable[tuple[str, int]]) -> None:
    """Remove generators that no code needs from the history."""
    with store.parts.database.write() as connection:
        for base_model, number in generators:
            of_kind = HISTORY.c.kind == Generator.KIND, HISTORY.c.key == base_model
            connection.execute(delete(HISTORY).where(*of_kind, HISTORY.c.version == number))


def leftovers(store: Store, *, aside: bool = False) -> list[Leftover]:
    """Return the files that killed commands left, or those in quarantine, each once."""
    found = (
        *store.parts.maintenance.leftovers(aside=aside),
        *store.blobs.leftovers(aside=aside),
        *store.manifests.leftovers(aside=aside),
    )
    return list({file.place: file for file in found}.values())
