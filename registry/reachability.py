"""Decide what may be deleted: everything that no ref reaches.

    refs, history ──▶ manifests ──▶ blobs          reached
    manifests/ ──▶ states newer than the refs      reached too: the database may be an old copy
    anything else                                  garbage

`prune`, `evict` and `rm` share one walk. It reads every manifest and compares it with the database. If they disagree,
nothing is deleted.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from sqlalchemy import Table, and_, delete, or_, select

from registry.encoding import files_of, unpacked
from registry.errors import DamagedStore, MissingBlob, StoreLocked
from registry.files import failpoint
from registry.manifests import KINDS, Generator, Removed, State, Task
from registry.storage.blobs.backend import BlobInfo, Leftover
from registry.tables import HISTORY, REFS, REPAIR_HINT, index_of, key_of, packed_files

if TYPE_CHECKING:
    from registry.states import StateStore

Name = tuple[str, str]
"""Kind and key of a ref."""
_PAGE = 500  # refs that are read at a time
_WITH_HISTORY = {Task.KIND, Generator.KIND}


@dataclass(frozen=True)
class FoundState:
    """A manifest in manifests/, as far as its own text shows."""

    info: BlobInfo
    name: Name
    seq: int
    number: int
    parent: str | None
    is_removal: bool  # of that name
    body: Any


class Committed(NamedTuple):
    """The state of a version that the database names."""

    seq: int
    parent: str | None
    weights: str | None = None  # of a task that has them


@dataclass
class Walk:
    """All manifests of a store, and what follows from them."""

    named: set[str] = field(default_factory=set)  # manifests that the database names
    blobs: set[str] = field(default_factory=set)  # reached
    disagreements: list[str] = field(default_factory=list)  # facts that database and manifests state differently
    missing: dict[str, list[str]] = field(default_factory=dict)  # manifests that cannot be read -> names
    newer: list[FoundState] = field(default_factory=list)  # states that the database does not know
    garbage: list[FoundState] = field(default_factory=list)
    unreadable: list[BlobInfo] = field(default_factory=list)  # files in manifests/ that nothing names
    removals: list[FoundState] = field(default_factory=list)  # committed
    idle: list[FoundState] = field(
        default_factory=list
    )  # generators that no code needs, or that came back as a later version
    committed: dict[Name, dict[int, Committed]] = field(default_factory=dict)  # name -> version -> its state

    def check(self, place: str) -> None:
        """Raise `DamagedStore` if anything is not as the database says, or unknown."""
        facts = [
            *self.disagreements,
            *(f"{owners[0]}: manifest {digest} cannot be read" for digest, owners in self.missing.items()),
            *(f"manifest {info.digest} cannot be read" for info in self.unreadable),
        ]
        if facts:
            fact = f"{place}: {facts[0]}; icm deletes nothing until this is repaired"
            raise DamagedStore(fact, path=place, hint=REPAIR_HINT)

    def reach(self, body: Any) -> None:
        """Keep the blobs that a manifest needs."""
        self.blobs.update(str(file) for _, file in files_of(body))


def walk(store: StateStore, visit: Callable[[Name, Any], None] = lambda name, body: None) -> Walk:
    """Read all manifests of a store and compare them with its database.

    Args:
        store: Held alone, unless the result is only shown.
        visit: Called with name and JSON of each manifest that the database names or that is newer.
    """
    found, used, generators = Walk(), set[str](), list[tuple[Name, Generator, Any]]()
    store.parts.database.meta()
    files = {info.digest: info for info in store.manifests.all()}
    store.manifests.fetch(files)
    for name, row, versions, uses in _names(store):
        facts, states = _compare(store, found, name, row, versions)
        found.disagreements += facts
        found.committed[name] = {one.number: _committed(one) for one in states.values()}
        for digest, state in states.items():
            body = _body(store, digest)
            visit(name, body)
            if uses.get(digest) not in (None, packed_files(body)):
                found.disagreements.append(f"the files of version {state.number} of {name[0]} {name[1]!r} are wrong")
            if isinstance(state, Removed) and digest in files:
                found.removals.append(_found(files[digest], body))
            if isinstance(state, Generator):  # reached below, unless it is idle
                generators.append((name, state, body))
                continue
            found.reach(body)
            if isinstance(state, Task) and state.code is not None:
                used.add(str(state.code.generator))
    _sort(found, _rest(store, found, files), used, store.blobs.exists)
    for one in found.newer:
        found.reach(one.body)
        visit(one.name, one.body)
        used.update(str(file) for use, file in files_of(one.body) if use == "generators")
    last = {(name, one.blob): one.version for name, one, _ in sorted(generators, key=lambda row: row[1].version)}
    for name, generator, body in generators:
        info, is_last = files.get(str(generator.manifest)), generator.version == last[name, generator.blob]
        is_current = generator.version == max(found.committed[name])
        if is_current or (is_last and generator.blob in used) or info is None:
            found.reach(body)
        else:
            found.idle.append(_found(info, body))
    return found


def _names(store: StateStore) -> Iterator[tuple[Name, dict[str, Any] | None, dict[int, str], dict[str, bytes]]]:
    """Yield each name with its row in `refs`, its versions, and the files of each, all of the same moment."""
    last, is_complete = ("", ""), False
    while not is_complete:
        with store.parts.database.read() as connection:
            after = select(REFS).where(_after(REFS, last)).order_by(REFS.c.kind, REFS.c.key).limit(_PAGE)
            page = [dict(row) for row in connection.execute(after).mappings()]
            is_complete = len(page) < _PAGE
            up_to = [] if is_complete else [~_after(HISTORY, (page[-1]["kind"], page[-1]["key"]))]
            history = connection.execute(select(HISTORY).where(_after(HISTORY, last), *up_to)).all()
        versions, uses = defaultdict[Name, dict[int, str]](dict), defaultdict[Name, dict[str, bytes]](dict)
        for kind, key, number, digest, files in history:
            versions[kind, key][number], uses[kind, key][digest] = digest, files
        for row in page:
            last = row["kind"], row["key"]
            yield last, row, versions.pop(last, {}), uses[last]
        yield from ((name, None, numbers, uses[name]) for name, numbers in versions.items())


def _after(table: Table, name: Name) -> Any:
    return or_(table.c.kind > name[0], and_(table.c.kind == name[0], table.c.key > name[1]))


def _compare(
    store: StateStore, found: Walk, name: Name, row: dict[str, Any] | None, versions: dict[int, str]
) -> tuple[list[str], dict[str, State]]:
    """Return the errors in the rows of a name, and digest -> state of the manifests that they name."""
    kind, key = name
    what = f"{kind} {key!r}"
    digests = dict.fromkeys([*versions.values(), *([] if row is None else [row["manifest"]])])
    states = dict[str, State]()
    found.named.update(digests)
    for digest in digests:
        try:
            states[digest] = store.state(digest)
        except DamagedStore:
            if is_named(store, name, digest):  # else another process replaced it since
                found.missing.setdefault(digest, []).append(what)
    if row is None:
        return [f"{what} has versions but no ref"], states
    facts = []
    state = states.get(row["manifest"])
    if state is not None:
        index = index_of(state, row["manifest"])
        if wrong := [column for column, value in index.items() if row[column] != value]:
            facts.append(f"{', '.join(wrong)} of {what} differ from its manifest")
    expected = row["manifest"] if kind in _WITH_HISTORY else None
    if versions.get(row["version"]) != expected or (versions and max(versions) != row["version"]):
        facts.append(f"the versions of {what} differ from its ref")
    for number, digest in versions.items():
        one = states.get(digest)
        if one is not None and (one.KIND, key_of(kind, one.ref), one.number) != (kind, key, number):
            facts.append(f"version {number} of {what} is {one.KIND} {one.ref!r} of version {one.number}")
    return facts, states


def is_named(store: StateStore, name: Name, digest: str) -> bool:
    """Return whether the database names a manifest for a name."""
    with store.parts.database.read() as connection:
        return any(
            connection.execute(
                select(table.c.key).where(table.c.kind == name[0], table.c.key == name[1], table.c.manifest == digest)
            ).first()
            for table in (REFS, HISTORY)
        )


def _body(store: StateStore, digest: str) -> Any:
    return unpacked(store.manifests.read(digest))


def _rest(store: StateStore, found: Walk, files: Mapping[str, BlobInfo]) -> dict[Name, list[FoundState]]:
    """Return the manifests that the database does not name, by name and age."""
    rest = defaultdict[Name, list[FoundState]](list)
    for digest, info in files.items():
        if digest not in found.named:
            try:
                one = _found(info, _body(store, digest))
            except MissingBlob:  # another process deleted it since
                continue
            except (DamagedStore, KeyError, TypeError, ValueError, AttributeError):
                found.unreadable.append(info)
            else:
                rest[one.name].append(one)
    for states in rest.values():
        states.sort(key=lambda one: one.seq)
    return rest


def _found(info: BlobInfo, body: Any) -> FoundState:
    kind = body["type"].split("/")[0]
    if kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r}")
    is_removal = kind == Removed.KIND
    name = body["name"] if kind in ("task", "base", "removed") else body["base_model"]
    kind = body["of"] if is_removal else kind
    return FoundState(
        info,
        (kind, key_of(kind, name)),
        body.get("seq", 0),
        body.get("version", 1),
        body.get("parent"),
        is_removal,
        body,
    )


def _committed(state: State) -> Committed:
    has_weights = isinstance(state, Task) and not state.final.is_evicted
    return Committed(state.seq, state.parent, state.final.weights if has_weights else None)  # type: ignore[attr-defined]


def _sort(found: Walk, rest: dict[Name, list[FoundState]], used: set[str], exists: Callable[[str], bool]) -> None:
    """Sort the manifests that the database does not name into newer states and garbage."""
    removed = {one.name: one.seq for one in found.removals}
    for name, states in rest.items():
        committed, last = found.committed.get(name, {}), removed.get(name, -1)
        # A removal without a ref was not committed. Nothing is garbage because of it.
        removals = [one.seq for one in states if one.is_removal and one.seq > last]
        lost = set[str]()
        for one in states:
            if one.seq <= last:
                is_garbage = True
            elif one.is_removal:
                is_over = bool(committed) and one.seq < committed[max(committed)].seq
                is_garbage = is_over or (not committed and all(other.is_removal for other in states))
            else:
                is_after_removal = any(seq < one.seq for seq in removals)
                is_new = is_after_removal and one.parent is None
                is_garbage = not is_new and _is_replaced(one, committed, lost, used, exists)
            if is_garbage:
                lost.add(one.info.digest)
            (found.garbage if is_garbage else found.newer).append(one)


def _is_replaced(
    one: FoundState, committed: dict[int, Committed], lost: set[str], used: set[str], exists: Callable[[str], bool]
) -> bool:
    """Return whether a state has had its turn: a later one was committed, or another one in its place.

    If an old copy of the database was used for a while, the later one was made without knowing this one.
    """
    if not committed:
        return False
    newest = max(committed)
    present = committed.get(one.number, committed[newest])
    is_task = one.name[0] == Task.KIND
    if is_task and one.number > newest:
        return False
    if one.number in committed and one.seq <= present.seq:
        # Its eviction deleted the weights that the later one needs.
        return not (is_task and present.weights and "evicted_at" in one.body["final"] and not exists(present.weights))
    if one.number < newest and one.number not in committed:
        # The database has lost a version; only generators are forgotten on purpose.
        return one.name[0] == Generator.KIND and not used & {str(file) for _, file in files_of(one.body)}
    return one.parent is None or one.parent == present.parent or one.parent in lost


def count_uses(store: StateStore) -> Counter[str]:
    """Return digest -> how often manifests name the blob, in all versions; each adapter that needs it counts.

    Raises:
        DamagedStore: The database disagrees with the manifests, so nothing may be deleted.
    """
    uses = Counter[str]()
    walk(store, lambda _, body: uses.update(str(file) for _, file in files_of(body))).check(store.parts.database.place)
    return uses


def manifests_of(store: StateStore, kind: str) -> Iterator[tuple[Name, Any]]:
    """Yield name and JSON of the readable manifests of a kind, in all versions."""
    for name, row, versions, _ in _names(store):
        if kind == name[0]:
            for digest in dict.fromkeys([*versions.values(), *([] if row is None else [row["manifest"]])]):
                try:
                    yield name, _body(store, digest)
                except DamagedStore:  # `verify` reports it
                    continue


@dataclass(frozen=True)
class PruneReport:
    """What prune deleted, or would delete."""

    blobs: int
    manifests: int
    temporary_files: int  # left by killed commands, and what quarantine held if that was asked for
    freed_bytes: int
    generators: int = 0  # no code needed them any more
    young: int = 0  # files that stay for now: a running command may be about to refer to them
    young_bytes: int = 0
    unlisted: tuple[str, ...] = ()  # names with states that the database does not know; nothing of them is deleted
    folders: tuple[str, ...] = ()  # found among the temporary files or in quarantine; they stay


def free(store: StateStore, files: Iterable[str], names: Iterable[str]) -> int | None:
    """Delete blobs and earlier states of tasks that nothing reaches; see `Store.free`."""
    try:
        with store.exclusive():
            found = walk(store)
            found.check(store.parts.database.place)
            for one in found.idle:
                found.reach(one.body)
            keys = {key_of("task", name) for name in names}
            states = [one for one in found.garbage if one.name[0] == "task" and one.name[1] in keys]
            doomed = {str(file) for file in files} | {str(file) for one in states for _, file in files_of(one.body)}
            freed = _delete_states(store, states)
            freed += store.blobs.delete(sorted(doomed - found.blobs))
            if not store.manifests.is_remote:  # else the states stay while they are young
                left_names = {one.name for one in found.newer}
                freed += _forget_removals(
                    store, [one for one in found.removals if one.name[1] in keys and one.name not in left_names]
                )
            store.parts.maintenance.after_deletion()
    except StoreLocked:
        return None
    return freed


def _delete_states(store: StateStore, states: Sequence[FoundState], newest: float | None = None) -> int:
    """Delete manifests and return the bytes freed; call it before their blobs are deleted.

    So a state without its blobs does not come back if the database is lost. Removals that were not committed go first:
    they must not be taken for the reason why others are gone.
    """
    freed = 0
    for is_removal in (True, False):
        digests = [one.info.digest for one in states if one.is_removal == is_removal]
        freed += store.manifests.delete(digests, newest=newest)
        store.manifests.sync_deletions(digests)
        failpoint("manifests-deleted")
    return freed


def prune(store: StateStore, *, grace: float | None, empty_quarantine: bool, dry_run: bool) -> PruneReport:
    """Delete garbage; see `Store.prune`."""
    if dry_run:
        return _prune(store, grace, empty_quarantine, dry_run=True)
    with store.exclusive():
        report = _prune(store, grace, empty_quarantine, dry_run=False)
        store.parts.maintenance.after_deletion()
    return report


def _prune(store: StateStore, grace: float | None, empty_quarantine: bool, *, dry_run: bool) -> PruneReport:
    newest = store.blobs.now() - (store.blobs.grace if grace is None else grace)
    found = walk(store)
    found.check(store.parts.database.place)
    idle = [one for one in found.idle if one.info.modified <= newest]
    for one in found.idle:
        if one not in idle:
            found.reach(one.body)
    states = [one for one in found.garbage if one.info.modified <= newest]
    young_states = [one for one in found.garbage if one.info.modified > newest]
    # A removal stays as long as earlier states of its name, which must not come back if the database is lost.
    left_names = {one.name for one in (*young_states, *found.newer)}
    removals = [one for one in found.removals if one.info.modified <= newest and one.name not in left_names]
    stale = [blob for blob in store.blobs.all() if blob.digest not in found.blobs]
    doomed = [blob for blob in stale if blob.modified <= newest]
    young = [blob for blob in stale if blob.modified > newest]
    left = leftovers(store) + (leftovers(store, aside=True) if empty_quarantine else [])
    temporary = [file for file in left if file.modified <= newest and not file.is_folder]
    gone = [*states, *idle, *removals]
    if not dry_run:
        if idle:
            store.parts.maintenance.run(lambda: _forget(store, idle))
        _delete_states(store, [*states, *idle], newest)
        store.blobs.delete((blob.digest for blob in doomed), newest=newest)
        _forget_removals(store, removals, newest)
        for file in temporary:
            file.remove()
    return PruneReport(
        blobs=len(doomed),
        manifests=len(gone),
        temporary_files=len(temporary),
        freed_bytes=sum(
            (*(one.info.size for one in gone), *(one.size for one in doomed), *(one.size for one in temporary))
        ),
        generators=len(idle),
        young=len(young) + len(young_states),
        young_bytes=sum(blob.size for blob in young) + sum(one.info.size for one in young_states),
        unlisted=tuple(sorted({one.name[1] for one in found.newer})),
        folders=tuple(file.place for file in left if file.is_folder),
    )


def _forget_removals(store: StateStore, removals: Sequence[FoundState], newest: float | None = None) -> int:
    """Delete removals, after the states that must not come back; return the bytes freed."""
    if removals:
        store.parts.maintenance.run(lambda: _forget(store, removals))
    return store.manifests.delete((one.info.digest for one in removals), newest=newest)


def _forget(store: StateStore, states: Iterable[FoundState]) -> None:
    """Remove generators that no code needs, and removals that are over, from the database."""
    with store.parts.database.write() as connection:
        for one in states:
            table = REFS if one.is_removal else HISTORY
            connection.execute(delete(table).where(table.c.manifest == one.info.digest))


def leftovers(store: StateStore, *, aside: bool = False) -> list[Leftover]:
    """Return the files that killed commands left, or those in quarantine, each once."""
    found = (
        *store.parts.maintenance.leftovers(aside=aside),
        *store.blobs.leftovers(aside=aside),
        *store.manifests.leftovers(aside=aside),
    )
    return list({file.place: file for file in found}.values())
