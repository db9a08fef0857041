"""Find what is wrong with a store, and put it right. Nothing is ever deleted here.

verify    database ⇄ manifests ──▶ blobs: there, of the right length, and (`read_data`) the right bytes
repair    files with one flipped bit are corrected, other damaged ones are moved to quarantine
rebuild   manifests/ ──▶ the newest state of each version of each name ──▶ a new database
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

from sqlalchemy import insert, update

from registry.errors import DamagedStore, MissingBlob, StoreIOError
from registry.manifests import Removed, State, files_of, unpacked
from registry.reachability import REPAIR, Name, Walk, leftovers, walk
from registry.storage.blobs.content import Blobs
from registry.tables import HISTORY, META, REFS, index_of, key_of

if TYPE_CHECKING:
    from registry.store import Store

Kind = Literal["database", "row", "unlisted", "missing", "length", "digest", "orphan", "leftover", "remark"]

_HARMLESS = {"orphan", "leftover", "remark"}
OF_DATABASE = {"database", "row", "unlisted"}
"""What a rebuild of the database repairs."""
MAX_REPAIRED_BYTES = 1 << 16
"""Of a file in which one flipped bit is looked for: half a million hashes take seconds."""
_ROWS = 500


@dataclass(frozen=True)
class Finding:
    """One thing that is not as it should be."""

    kind: Kind
    message: str
    path: str
    digest: str | None = None  # the file it is about
    tasks: tuple[str, ...] = ()  # that need it
    is_manifest: bool = False

    @property
    def is_problem(self) -> bool:
        """False for what a crash may leave and prune removes, and for remarks on adapters that are kept as they are."""
        return self.kind not in _HARMLESS


@dataclass(frozen=True)
class Rebuilt:
    """What a new database has."""

    tasks: int
    restored: tuple[str, ...] = ()  # tasks that the old database did not have, or had in an older state
    removed: tuple[str, ...] = ()  # tasks that stay removed; files of them are left
    lost: tuple[str, ...] = ()  # tasks that the old database had, and of which no manifest can be read


def verify(store: Store, *, read_data: bool, names: Sequence[str] = ()) -> Iterator[Finding]:
    """Yield what is wrong; see `Store.verify`."""
    place = store.parts.database.place
    try:
        damage = [Finding("database", fact, place) for fact in store.parts.database.damage()]
        found = None if damage else walk(store)
    except DamagedStore as error:
        damage, found = [Finding("database", error.message, place)], None
    yield from damage
    if found is None:  # the rows of a broken database prove nothing about the files
        return
    chosen = {key_of("task", store.task(name).name) for name in names}
    yield from _of_database(store, found, place)
    needed, expected = _expected(store, found, chosen)
    for digest, size in expected.items():
        yield from _of_file(store.blobs, digest, size, tuple(sorted(needed[digest])), read_data=read_data)
    if not names:
        yield from _strays(store, found)


def _of_database(store: Store, found: Walk, place: str) -> Iterator[Finding]:
    for fact in found.disagreements:
        yield Finding("row", fact, place)
    for digest, owners in found.missing.items():
        kind: Kind = "digest" if store.manifests.exists(digest) else "missing"
        fact = f"the manifest of {', '.join(owners)} is {'damaged' if kind == 'digest' else 'missing'}"
        tasks = tuple(owner.split(" ", 1)[1].strip("'") for owner in owners if owner.startswith("task "))
        yield Finding(kind, fact, store.manifests.place(digest), digest, tasks, is_manifest=True)
    unlisted = defaultdict[Name, list[Any]](list)
    for one in found.newer:
        unlisted[one.name].append(one)
    for (kind_of, key), states in unlisted.items():
        digest = states[-1].info.digest
        present = store.ref(kind_of, key)
        if present == digest:  # published since the walk began
            continue
        where, task = store.manifests.place(digest), (key,) if kind_of == "task" else ()
        if len(states) == 1 and states[0].body.get("parent") == present:
            fact = f"a change of {kind_of} {key!r} was not committed: the command that made it was killed"
            yield Finding("leftover", fact, where, digest, task)
        else:
            fact = f"{kind_of} {key!r} has a state that the database does not know"
            yield Finding("unlisted", fact, where, digest, task)


def _expected(store: Store, found: Walk, chosen: set[str]) -> tuple[dict[str, set[str]], dict[str, int]]:
    """Return digest -> tasks that need the blob, and digest -> its length."""
    needed, expected = defaultdict[str, set[str]](set), dict[str, int]()
    for digest in sorted(found.reached):
        if digest in found.missing or not store.manifests.exists(digest):
            continue
        body = unpacked(store.manifests.read(digest))
        is_task = body["type"].startswith("task/")
        if chosen and not (is_task and key_of("task", body["name"]) in chosen):
            continue
        for _, file in files_of(body):
            expected[str(file)] = file.size
            if is_task:
                needed[str(file)].add(body["name"])
    return needed, expected


def _of_file(blobs: Blobs, digest: str, size: int, tasks: tuple[str, ...], *, read_data: bool) -> Iterator[Finding]:
    """Yield what is wrong with a blob, if anything is."""
    kind, fact = cast("tuple[Kind, str]", ("remark", ""))
    try:
        present = blobs.size(digest)
        if present != size:
            kind, fact = "length", f"has {present} bytes instead of {size}"
        elif read_data and not blobs.is_intact(digest):
            kind, fact = "digest", "does not match its digest"
    except MissingBlob:
        kind, fact = "missing", "is missing"
    except StoreIOError as error:
        kind, fact = "digest", f"cannot be read: {error}"
    if fact:
        yield Finding(kind, f"blob {digest} {fact}", blobs.place(digest), digest, tasks)


def _strays(store: Store, found: Walk) -> Iterator[Finding]:
    for info in found.unreadable:
        fact = f"manifest {info.digest} is damaged, and nothing refers to it"
        yield Finding("orphan", fact, store.manifests.place(info.digest), info.digest, is_manifest=True)
    for blob in store.blobs.all():
        if blob.digest not in found.reached:
            yield Finding(
                "orphan", f"nothing refers to blob {blob.digest}", store.blobs.place(blob.digest), blob.digest
            )
    for file in leftovers(store):
        name = file.place.rpartition("/")[2]
        yield Finding("leftover", f"{name} was left by a command that was killed", file.place)


def repair(store: Store, finding: Finding) -> str | None:
    """Correct one flipped bit of a damaged file, or move the file to quarantine; return what was done.

    None if the file is not damaged. The caller holds the store alone.
    """
    files = store.manifests if finding.is_manifest else store.blobs
    digest = finding.digest
    if digest is None or finding.kind not in ("length", "digest") or files.is_intact(digest):
        return None
    data = corrected(files.start(digest, MAX_REPAIRED_BYTES + 1), digest)
    moved = files.quarantine(digest)
    if data is None:
        return f"moved to {moved}"
    files.put(data)
    return f"corrected one flipped bit; the damaged file is at {moved}"


def corrected(data: bytes, digest: str) -> bytes | None:
    """Return bytes that have a digest and differ in at most one bit; None if there are none, or they are too many."""
    if len(data) > MAX_REPAIRED_BYTES:
        return None
    changed, hashed = bytearray(data), hashlib.sha256()
    for place, byte in enumerate(data):
        for bit in range(8):
            changed[place] = byte ^ 1 << bit
            rest = hashed.copy()
            rest.update(memoryview(changed)[place:])
            if rest.hexdigest() == digest:
                return bytes(changed)
        changed[place] = byte
        hashed.update(data[place : place + 1])
    return None


def rebuild(store: Store) -> Rebuilt:
    """Write the database again from the manifests; see `Store.rebuild`."""
    before = _known(store)
    with store.exclusive():
        states = defaultdict[Name, list[State]](list)
        for info in store.manifests.all():
            try:
                state = store.state(info.digest)
            except DamagedStore:
                continue  # `verify` names it
            kind = state.of if isinstance(state, Removed) else state.KIND
            states[kind, key_of(kind, state.ref)].append(state)
        refs, history = list[State](), list[State]()
        removed: list[str] = []
        for (kind, _), found in states.items():
            found.sort(key=lambda state: state.seq)
            gone = max((state.seq for state in found if isinstance(state, Removed)), default=-1)
            versions = {state.number: state for state in found if state.seq > gone}
            if versions:
                refs.append(versions[max(versions)])
                history += versions.values() if kind in ("task", "generator") else ()
            elif kind == "task":
                removed.append(found[-1].ref)
        _write(store, refs, history, max((state.seq for some in states.values() for state in some), default=0))
    tasks = {key_of("task", state.ref): state for state in refs if state.KIND == "task"}
    restored = [state.ref for key, state in tasks.items() if before is not None and before.get(key) != state.manifest]
    lost = sorted(set(before or ()) - tasks.keys() - set(map(str.lower, removed)))
    return Rebuilt(len(tasks), tuple(sorted(restored)), tuple(sorted(removed)), tuple(lost))


def _known(store: Store) -> dict[str, str] | None:
    """Return task -> manifest as the database has it; None if it cannot be read."""
    try:
        return {row["key"]: row["manifest"] for row in store.refs() if row["kind"] == "task"}
    except DamagedStore:
        return None


def _write(store: Store, refs: Sequence[State], history: Sequence[State], seq: int) -> None:
    rows = [index_of(state, str(state.manifest)) for state in refs]
    versions = [
        {"kind": one.KIND, "key": key_of(one.KIND, one.ref), "version": one.number, "manifest": one.manifest}
        for one in history
    ]
    with store.parts.database.rebuild() as connection:
        for table, values in ((REFS, rows), (HISTORY, versions)):
            for at in range(0, len(values), _ROWS):
                connection.execute(insert(table), values[at : at + _ROWS])
        connection.execute(update(META).values(seq=seq))


__all__ = ["OF_DATABASE", "REPAIR", "Finding", "Rebuilt", "rebuild", "repair", "verify"]
