"""Statements that move and remove refs, in an open transaction that holds the lock to write."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from sqlalchemy import Connection, Select, Table, bindparam, delete, insert, select, update
from sqlalchemy.exc import IntegrityError

from registry.errors import DamagedStore, LostRace, TaskConflict
from registry.manifests import Generator, State, Task
from registry.tables import HISTORY, META, REFS, REPAIR_HINT, index_of, key_of, version_of

_CHUNK = 500  # values in one statement
_WITH_HISTORY = {Task.KIND, Generator.KIND}


class Written(NamedTuple):
    """A manifest that is durable."""

    digest: str
    body: Any  # its JSON


def ref_of(kind: str, name: str) -> Select[Any]:
    """Select manifest and version of a ref."""
    return select(REFS.c.manifest, REFS.c.version).where(REFS.c.kind == kind, REFS.c.key == key_of(kind, name))


def chunks(values: Sequence[Any]) -> Iterator[Sequence[Any]]:
    """Return parts of a list that fit into one statement."""
    return (values[at : at + _CHUNK] for at in range(0, len(values), _CHUNK))


def _present(connection: Connection, states: Sequence[State]) -> dict[tuple[str, str], tuple[str, int]]:
    """Return kind and key -> manifest and version of the refs of some states."""
    found: dict[tuple[str, str], tuple[str, int]] = {}
    by_kind = defaultdict[str, list[str]](list)
    for state in states:
        by_kind[state.KIND].append(key_of(state.KIND, state.ref))
    for kind, keys in by_kind.items():
        for some in chunks(keys):
            query = select(REFS.c.key, REFS.c.manifest, REFS.c.version).where(REFS.c.kind == kind, REFS.c.key.in_(some))
            found |= {(kind, row.key): (row.manifest, row.version) for row in connection.execute(query)}
    return found


def raise_seq(connection: Connection, states: Sequence[State]) -> None:
    """Record the highest `seq` of some states."""
    seq = max((state.seq for state in states), default=0)
    connection.execute(update(META).where(META.c.seq < seq).values(seq=seq))


def move(
    connection: Connection,
    states: Sequence[State],
    written: Sequence[Written],
    expected: Sequence[str | None],
    *,
    older: bool = False,
) -> None:
    """Write refs and history, if the refs are as expected.

    The state with the highest number becomes current.
    """
    present, rows = _present(connection, states), list[dict[str, Any]]()
    newest = {(one.KIND, key_of(one.KIND, one.ref)): one.number for one in sorted(states, key=lambda one: one.number)}
    _check_versions(connection, [one for one in newest if one not in present])
    for state, (digest, _), before in zip(states, written, expected, strict=True):
        key = state.KIND, key_of(state.KIND, state.ref)
        manifest, number = present.get(key, (None, 0))
        is_older, is_newest = state.number < number, state.number == newest[key]
        found = connection.scalar(_version(state)) if is_older and older else manifest
        if (is_older or is_newest) and found != before:
            if before is None and isinstance(state, Task):
                raise TaskConflict(state.name)
            raise _lost(f"{state.KIND} {state.ref!r}")
        if is_newest and not is_older:
            rows.append(index_of(state, digest))
    versions = [
        version_of(one, digest, body)
        for one, (digest, body) in zip(states, written, strict=True)
        if one.KIND in _WITH_HISTORY
    ]
    replace_rows(connection, REFS, ("kind", "key"), rows)
    replace_rows(connection, HISTORY, ("kind", "key", "version"), versions)


def _check_versions(connection: Connection, names: Sequence[tuple[str, str]]) -> None:
    """Raise `DamagedStore` if a name without a ref has versions: a new task must not replace them."""
    for kind in _WITH_HISTORY:
        for some in chunks([key for of, key in names if of == kind]):
            query = select(HISTORY.c.key).where(HISTORY.c.kind == kind, HISTORY.c.key.in_(some))
            if (key := connection.scalar(query.limit(1))) is not None:
                raise DamagedStore(f"the database has versions of {kind} {key!r} but no ref", hint=REPAIR_HINT)


def replace_rows(connection: Connection, table: Table, key: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows in place of those with the same key."""
    if rows:
        same = [table.c[name] == bindparam(f"old_{name}") for name in key]
        connection.execute(delete(table).where(*same), [{f"old_{name}": row[name] for name in key} for row in rows])
        try:
            connection.execute(insert(table), rows)
        except IntegrityError as error:  # rows with these keys were deleted just now
            raise DamagedStore("the database is damaged: an index lacks rows of its table", hint=REPAIR_HINT) from error


def _lost(what: str) -> LostRace:
    return LostRace(f"{what} was changed by another process", hint="run the command again")


def _version(state: State) -> Select[Any]:
    key = key_of(state.KIND, state.ref)
    of_version = HISTORY.c.kind == state.KIND, HISTORY.c.key == key, HISTORY.c.version == state.number
    return select(HISTORY.c.manifest).where(*of_version)


def remove_ref(connection: Connection, state: State) -> None:
    """Delete the ref of a state and its history; raise `LostRace` if the ref has moved."""
    key = key_of(state.KIND, state.ref)
    if connection.execute(ref_of(state.KIND, state.ref)).scalar() != state.manifest:
        raise _lost(f"{state.KIND} {state.ref!r}")
    connection.execute(delete(REFS).where(REFS.c.kind == state.KIND, REFS.c.key == key))
    connection.execute(delete(HISTORY).where(HISTORY.c.kind == state.KIND, HISTORY.c.key == key))
