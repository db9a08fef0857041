"""Find damage in a store, and repair it. Nothing is ever deleted here.

verify    database ⇄ manifests ──▶ blobs: present, of the right length, and (`read_data`) with the right bytes
repair    files with one flipped bit are corrected, other damaged ones are moved to quarantine
rebuild   manifests/ ──▶ the newest state of each version of each name ──▶ a new database
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeGuard

from sqlalchemy import insert, select, update

from registry.encoding import encode, files_of, unpacked
from registry.errors import DamagedStore, MissingBlob, StoreIOError
from registry.findings import OF_FILES, Finding, Kind, Rebuilt
from registry.manifests import File, Generator, Removed, Run, State, Task
from registry.reachability import FoundState, Name, Walk, is_named, leftovers, walk
from registry.storage.blobs.content import Blobs
from registry.tables import HISTORY, META, REFS, index_of, key_of, version_of

if TYPE_CHECKING:
    from registry.states import StateStore

MAX_REPAIRED_BYTES = 1 << 16
"""Larger files are not searched for a flipped bit: half a million hashes take seconds."""
_ROWS = 500


@dataclass
class _Needs:
    """The blobs that manifests need."""

    chosen: set[str]  # keys of tasks; all if empty
    sizes: dict[str, int]
    tasks: defaultdict[str, set[str]]
    of_runs: dict[str, Name]  # a running training replaces these

    def add(self, name: Name, body: Any) -> None:
        """Add the blobs of one manifest."""
        kind, key = name
        if not self.chosen or (kind == "task" and key in self.chosen):
            for _, file in files_of(body):
                self.sizes[str(file)] = file.size
                if kind == "task":
                    self.tasks[str(file)].add(body["name"])
                elif kind == Run.KIND:
                    self.of_runs[str(file)] = name


def verify(store: StateStore, *, read_data: bool, names: Sequence[str] = ()) -> Iterator[Finding]:
    """Yield the findings; see `Store.verify`."""
    place = store.parts.database.place
    try:
        damage = list(store.parts.database.damage())
        needs = _Needs({key_of("task", store.task(name).name) for name in names}, {}, defaultdict(set), {})
        found = None if damage else walk(store, needs.add)
    except DamagedStore as error:
        damage, found = [error.message], None
    yield from (Finding("database", fact, place) for fact in damage)
    if found is None:  # its rows prove nothing about the files
        return
    yield from (Finding("row", fact, place) for fact in found.disagreements)
    yield from _of_manifests(store, found)
    if read_data and store.manifests.is_remote:  # so far, copies on this machine may have been read
        yield from _of_remote_manifests(store, found)
    yield from _of_newer(store, found.newer)
    yield from _of_blobs(store, needs, read_data=read_data)
    if not names:
        yield from _strays(store, found)


def _of_manifests(store: StateStore, found: Walk) -> Iterator[Finding]:
    for digest, owners in found.missing.items():
        kind: Kind = "digest" if store.manifests.exists(digest) else "missing"
        fact = f"the manifest of {', '.join(owners)} is {'damaged' if kind == 'digest' else 'missing'}"
        tasks = tuple(owner.split(" ", 1)[1].strip("'") for owner in owners if owner.startswith("task "))
        yield Finding(kind, fact, store.manifests.place(digest), digest, tasks, is_manifest=True)
    for info in found.unreadable:
        fact = f"manifest {info.digest} is damaged, and the database does not name it"
        yield Finding("digest", fact, store.manifests.place(info.digest), info.digest, is_manifest=True)


def _of_remote_manifests(store: StateStore, found: Walk) -> Iterator[Finding]:
    for digest in sorted(found.named - found.missing.keys()):
        state = store.state(digest)
        kind, fact = _problem_of(store.manifests, digest, None, None, read_data=True)
        if kind is not None and is_named(store, (state.KIND, key_of(state.KIND, state.ref)), digest):
            tasks = (state.ref,) if isinstance(state, Task) else ()
            place = store.manifests.place(digest)
            yield Finding(kind, f"manifest {digest} {fact}", place, digest, tasks, is_manifest=True)


def _of_newer(store: StateStore, newer: Sequence[FoundState]) -> Iterator[Finding]:
    """Yield names with states that the database does not have: a command was killed, or the database is an old copy."""
    states = defaultdict[Name, list[FoundState]](list)
    for one in newer:
        if not is_named(store, one.name, one.info.digest):  # else it was published since the walk began
            states[one.name].append(one)
    uncommitted = list[Name]()
    for (kind, key), some in sorted(states.items(), key=lambda one: one[0]):
        # A generator that is not in use comes back with the change of a task that names it.
        if kind == Generator.KIND or all(_is_next(store, one) for one in some):
            uncommitted.append((kind, key))
            continue
        fact = f"{kind} {key!r} has {len(some)} states that are missing from the database"
        digest = some[-1].info.digest
        named = (key,) if kind == "task" else ()
        yield Finding("unlisted", fact, store.manifests.place(digest), digest, named)
    if uncommitted:
        what = ", ".join(f"{kind} {key!r}" for kind, key in uncommitted[:4])
        more = f" and {len(uncommitted) - 4} more" if len(uncommitted) > 4 else ""
        fact = f"the database lacks the last change of {what}{more}: a command was killed, or the database is a copy"
        tasks = tuple(key for kind, key in uncommitted if kind == "task")
        yield Finding("uncommitted", fact, store.manifests.home, tasks=tasks)


def _is_next(store: StateStore, one: FoundState) -> bool:
    """Return whether a state replaces one that the database has, or is the first of its name."""
    return store.ref(*one.name) is None if one.parent is None else is_named(store, one.name, one.parent)


def _of_blobs(store: StateStore, needs: _Needs, *, read_data: bool) -> Iterator[Finding]:
    blobs = store.blobs
    present = None if needs.chosen else {info.digest: info.size for info in blobs.all()}
    for digest, expected in sorted(needs.sizes.items()):
        kind, fact = _problem_of(blobs, digest, expected, present, read_data=read_data)
        if kind == "missing" and digest in needs.of_runs and not _run_needs(store, needs.of_runs[digest], digest):
            continue
        if kind is not None:
            tasks = tuple(sorted(needs.tasks[digest]))
            yield Finding(kind, f"blob {digest} {fact}", blobs.place(digest), digest, tasks)


def _run_needs(store: StateStore, name: Name, digest: str) -> bool:
    """Return whether the current state of a training run needs a blob; it may have been replaced since the walk."""
    try:
        current = store.run(name[1])
    except DamagedStore:  # its manifest is reported, and may need the blob
        return True
    return current is not None and digest in current.files


def _problem_of(
    blobs: Blobs, digest: str, expected: int | None, present: dict[str, int] | None, *, read_data: bool
) -> tuple[Kind | None, str]:
    try:
        size = blobs.size(digest) if present is None else present.get(digest)
        if size is None:
            return "missing", "is missing"
        if expected not in (None, size):
            return "length", f"has {size} bytes instead of {expected}"
        if read_data and not blobs.is_intact(digest):
            return "digest", "does not match its digest"
    except MissingBlob:
        return "missing", "is missing"
    except StoreIOError as error:
        return "digest", f"cannot be read: {error}"
    return None, ""


def _strays(store: StateStore, found: Walk) -> Iterator[Finding]:
    for one in found.idle:
        found.reach(one.body)
    for blob in () if found.missing or found.unreadable else store.blobs.all():  # they may need any blob
        if blob.digest not in found.blobs:
            fact = f"nothing refers to blob {blob.digest}"
            yield Finding("orphan", fact, store.blobs.place(blob.digest), blob.digest)
    for file in leftovers(store):
        name = file.place.rpartition("/")[2]
        yield Finding("leftover", f"{name} was left by a command that was killed", file.place)


def repair(store: StateStore, finding: Finding) -> str | None:
    """Correct one flipped bit of a damaged file, or move the file to quarantine; return the result.

    None if the file is not damaged. The caller holds the store alone.
    """
    files, digest = store.manifests if finding.is_manifest else store.blobs, finding.digest
    if digest is None or finding.kind not in OF_FILES or not files.exists(digest):
        return None
    if not files.is_intact(digest):
        return _repaired(files, digest)
    return _repaired_inside(store, digest) if finding.is_manifest else None


def _repaired_inside(store: StateStore, digest: str) -> str | None:
    """Repair the documents that an intact manifest shares with others; move a file that is no manifest."""
    try:
        damaged = _damaged_documents(store, digest)
    except (DamagedStore, KeyError, TypeError, ValueError, AttributeError):
        return f"moved to {store.manifests.quarantine(digest)}"
    return "; ".join(_repaired(store.blobs, file) for file in damaged) or None


def _damaged_documents(store: StateStore, digest: str) -> list[File]:
    files = files_of(unpacked(store.manifests.read(digest)))
    documents = dict.fromkeys(file for use, file in files if use == "manifests")
    return [file for file in documents if store.blobs.exists(file) and not store.blobs.is_intact(file)]


def _repaired(files: Blobs, digest: str) -> str:
    data, how = _right_bytes(files, digest)
    moved = files.quarantine(digest)
    if data is None:
        return f"moved to {moved}"
    files.put(data)
    return f"corrected {how}; the damaged file is at {moved}"


def _right_bytes(files: Blobs, digest: str) -> tuple[bytes | None, str]:
    """Return the bytes that a damaged file had, and how they were found; None if they are lost."""
    if files.is_intact(digest):  # what has this name was never right
        return None, ""
    try:
        return files.read(digest), "with the copy in the cache"
    except DamagedStore:
        return corrected(files.start(digest, MAX_REPAIRED_BYTES + 1), digest), "one flipped bit"


def corrected(data: bytes, digest: str) -> bytes | None:
    """Return the bytes with a digest that differ from `data` in one bit; None if there are none, or too many."""
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


def rebuild(store: StateStore) -> Rebuilt:
    """Write the database again from the manifests; see `Store.rebuild`."""
    with store.exclusive():
        before = _known(store)
        states = _all_states(store)
        refs, history, removed = _newest(store, states)
        _write(store, refs, history, max((one.seq for some in (refs, *states.values()) for one in some), default=0))
    tasks = {state.ref: str(state.manifest) for state in refs if state.KIND == "task"}
    readable = {state.manifest for some in states.values() for state in some}
    return Rebuilt(
        len(tasks),
        restored=tuple(sorted(name for name, digest in tasks.items() if before and before.get(name) != digest)),
        removed=tuple(sorted(removed)),
        lost=tuple(sorted(name for name, digest in before.items() if name not in tasks and digest not in readable)),
    )


def _known(store: StateStore) -> dict[str, str]:
    """Return task -> manifest as the database has it; nothing if it cannot be read."""
    query = select(REFS.c.name, REFS.c.manifest).where(REFS.c.kind == "task")
    try:
        with store.parts.database.read() as connection:
            return {row.name: row.manifest for row in connection.execute(query)}
    except DamagedStore:
        return {}


def _all_states(store: StateStore) -> dict[Name, list[State]]:
    """Return all states in manifests/ by name and age; one flipped bit in a manifest is corrected first."""
    states = defaultdict[Name, list[State]](list)
    digests = [info.digest for info in store.manifests.all()]
    store.manifests.fetch(digests)
    for digest in digests:
        try:
            state = _state(store, digest)
        except DamagedStore:  # `verify` reports it
            continue
        kind = state.of if isinstance(state, Removed) else state.KIND
        name = state.name if isinstance(state, Removed) else state.ref
        states[kind, key_of(kind, name)].append(state)
    for some in states.values():
        some.sort(key=lambda state: state.seq)
    return states


def _state(store: StateStore, digest: str) -> State:
    try:
        return store.state(digest)
    except DamagedStore:
        if not store.manifests.is_intact(digest):
            _correct(store.manifests, digest)
        for file in _damaged_documents(store, digest):
            _correct(store.blobs, file)
        return store.state(digest)


def _correct(files: Blobs, digest: str) -> None:
    """Correct one flipped bit; leave any other damage."""
    if _right_bytes(files, digest)[0] is not None:
        _repaired(files, digest)


def _newest(store: StateStore, states: dict[Name, list[State]]) -> tuple[list[State], list[State], list[str]]:
    """Return the newest state of each name and of each version, and the names of tasks that stay removed."""
    refs, history, removed = list[State](), list[State](), list[str]()
    for (kind, _), some in states.items():
        last = max((one for one in some if _is_committed(one, some)), key=lambda one: one.seq, default=None)
        versions = {
            one.number: one for one in some if not isinstance(one, Removed) and (not last or one.seq > last.seq)
        }
        versions = {number: _with_eviction(store, one, some) for number, one in versions.items()}
        if versions:
            refs.append(versions[max(versions)])
            history += versions.values() if kind in ("task", "generator") else ()
        if last is not None and last is not some[0]:  # else nothing is left that could come back
            refs.append(last)
            removed += [last.name] if kind == "task" and not versions else []
    return refs, history, removed


def _with_eviction(store: StateStore, newest: State, states: Sequence[State]) -> State:
    """Return the newest state of a version; evicted with the code of an earlier one, if that deleted its weights.

    Then an old copy of the database was used for a while.
    """
    if not isinstance(newest, Task) or newest.final.is_evicted or store.blobs.exists(newest.final.weights):
        return newest
    for one in reversed(states):
        if isinstance(one, Task) and one.final.is_evicted and one.final.weights == newest.final.weights:
            seq = max(state.seq for state in states) + 1
            facts = {"final": one.final, "checkpoints": one.checkpoints, "code": one.code}
            merged = replace(newest, seq=seq, parent=newest.manifest, **facts)  # type: ignore[arg-type]
            encoded = encode(merged)
            store.blobs.put_all(list(encoded.documents.values()))
            return replace(merged, manifest=store.manifests.put(encoded.data))
    return newest


def _is_committed(state: State, states: Sequence[State]) -> TypeGuard[Removed]:
    """Return whether a state is a removal, and no later state replaced the manifest that it was to remove."""
    return isinstance(state, Removed) and not any(
        one.seq > state.seq and one.parent == state.parent for one in states if not isinstance(one, Removed)
    )


def _write(store: StateStore, refs: Sequence[State], history: Sequence[State], seq: int) -> None:
    rows = [index_of(state, str(state.manifest)) for state in refs]
    versions = [
        version_of(one, str(one.manifest), unpacked(store.manifests.read(str(one.manifest)))) for one in history
    ]
    with store.parts.database.rebuild() as connection:
        for table, values in ((REFS, rows), (HISTORY, versions)):
            for at in range(0, len(values), _ROWS):
                connection.execute(insert(table), values[at : at + _ROWS])
        connection.execute(update(META).values(seq=seq))


__all__ = ["OF_FILES", "Finding", "Rebuilt", "rebuild", "repair", "verify"]
