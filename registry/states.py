"""Read and publish the states of a store.

A state that was read knows the manifest that it came from, and replaces exactly that one.
"""

from __future__ import annotations

import difflib
import math
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from typing import Any, Self, TypeVar, cast

from sqlalchemy import Select, func, or_, select

from registry.encoding import Shared, decode, encode, read_shared
from registry.errors import DamagedStore, GeneratorNotFound, LostRace, TaskConflict, TaskNotFound
from registry.filters import Selection
from registry.listing import IS_TASK, ROW, selected
from registry.manifests import BaseRecord, File, Generator, Part, Removed, Run, State, Task, now
from registry.names import Address, split_version
from registry.refs import Written, chunks, move, raise_seq, ref_of, remove_ref, replace_rows
from registry.storage.blobs.content import Blobs
from registry.storage.open import StoreParts
from registry.tables import HISTORY, META, REFS, REPAIR_HINT, TaskRow, index_of, key_of

OnDamage = Callable[[str, DamagedStore], None]

S = TypeVar("S", bound=State)
T = TypeVar("T")

PAGE = 500  # tasks that are read from the database at a time
_STATES = 1024  # manifests that stay in memory


class StateStore:
    """Reads and publishes states, and holds the locks; :class:`registry.store.Store` adds opening and maintenance.

    A store is used by one thread at a time, and is opened again after a fork. Any number of processes may have it open;
    those that delete wait for the others.
    """

    def __init__(
        self, address: Address, parts: StoreParts, *, cache: Any = None, on_damage: OnDamage | None = None
    ) -> None:
        self.address = address
        self.parts = parts
        self._lock, self._db, self._on_damage = parts.lock, parts.database, on_damage
        self.blobs = Blobs(parts.blobs, self._db.must_write, cache)
        self.manifests = Blobs(parts.manifests, self._db.must_write, cache, what="manifest")
        self._state = lru_cache(_STATES)(self._read_state)
        self._shared: Shared = lru_cache(_STATES)(self._read_shared)  # type: ignore[assignment]

    def close(self) -> None:
        """Release the store. Blobs can still be read."""
        self._lock.close()
        self._db.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # Read.

    def task(self, name: str) -> Task:
        """Return a task by name, in any case; `NAME@3` or `NAME@ALIAS` is one of its versions.

        Raises:
            TaskNotFound: There is none, or no such version.
            DamagedStore: Its manifest is missing or damaged.
        """
        found = self.find(name)
        if found is None:
            names = {known.lower(): known for known in self.names()}
            raise TaskNotFound(
                name, tuple(names[match] for match in difflib.get_close_matches(name.lower(), names, n=3))
            )
        return found

    def find(self, name: str) -> Task | None:
        """Return a task by name, as `task` does, or None if there is none."""
        name, version = split_version(name)
        with self._db.read() as connection:
            row = connection.execute(ref_of(Task.KIND, name)).first()
        if row is None:
            return None
        task = self._checked_task(row.manifest, name)
        if version is None:
            return task
        number = task.aliases.get(version) or (int(version) if version.isdecimal() and len(version) < 10 else None)
        if number == task.version:
            return task
        of_task = HISTORY.c.kind == Task.KIND, HISTORY.c.key == key_of(Task.KIND, name), HISTORY.c.version == number
        with self._db.read() as connection:
            digest = connection.scalar(select(HISTORY.c.manifest).where(*of_task))
        if digest is None:
            raise TaskNotFound(f"{task.name}@{version}", hint=f"run `icm log {task.name}` to list its versions")
        return self._checked_task(digest, name)

    def tasks(self, selection: Selection | None = None) -> Iterator[Task]:
        """Yield the selected tasks in the order asked for, few in memory at a time; no lock of the database is held."""
        for page in self._pages(selection or Selection(), REFS.c.key, REFS.c.name, REFS.c.manifest):
            self.manifests.fetch(row.manifest for row in page)
            yield from self.undamaged(page, lambda row: self._checked_task(row.manifest, row.name))

    def named(self, names: Sequence[str]) -> list[Task]:
        """Return tasks by name, each as often as it is named; damaged ones are left out as in `tasks`."""
        found: list[Task] = []
        for name in names:
            try:
                found.append(self.task(name))
            except DamagedStore as error:
                if self._on_damage is None or len(names) == 1:
                    raise
                self._on_damage(name, error)
        return found

    def rows(self, selection: Selection | None = None) -> Iterator[TaskRow]:
        """Yield the rows of the selected tasks, without reading manifests."""
        for page in self._pages(selection or Selection(), *ROW):
            yield from self.undamaged(page, TaskRow.of)

    def names(self, selection: Selection | None = None) -> list[str]:
        """Return the names of the selected tasks."""
        return [row.name for page in self._pages(selection or Selection(), REFS.c.key, REFS.c.name) for row in page]

    def count(self, selection: Selection | None = None) -> int:
        """Return how many tasks are selected."""
        inner = self._selected(selection or Selection(), REFS.c.key).order_by(None).subquery()
        with self._db.read() as connection:
            return int(connection.scalar(select(func.count()).select_from(inner)) or 0)

    def rows_of(
        self,
        *,
        names: Iterable[str] = (),
        folders: Iterable[str] = (),
        weights: Iterable[str] = (),
        tensors: Iterable[str] = (),
    ) -> list[TaskRow]:
        """Return the rows of tasks with one of these names, folders, weights or tensors; indexes find them."""
        asked = (
            (REFS.c.key, {key_of(Task.KIND, name) for name in names}),
            (REFS.c.folder, set(folders)),
            (REFS.c.weights, set(map(str, weights))),
            (REFS.c.tensors_key, set(tensors)),
        )
        found: dict[str, TaskRow] = {}
        with self._db.read() as connection:
            for column, values in asked:
                for some in chunks(sorted(values)):
                    rows = connection.execute(select(*ROW).where(IS_TASK, column.in_(some)))
                    found |= {row.name: TaskRow.of(row) for row in rows}
        return sorted(found.values(), key=lambda row: key_of(Task.KIND, row.name))

    def history(self, name: str) -> list[Task]:
        """Return the versions of a task, oldest first."""
        versions = cast(list[Task], self._history(Task.KIND, self.task(name).name))
        if not versions:
            raise DamagedStore(f"the database has no version of task {name!r}", hint=REPAIR_HINT)
        return versions

    def generators(self, base_model: str | None = None) -> list[Generator]:
        """Return the generators, of one base model if given, oldest first."""
        return cast(list[Generator], self._history(Generator.KIND, base_model))

    def generator(self, base_model: str) -> Generator | None:
        """Return the generator in use for a base model; None before the first training."""
        return cast("Generator | None", self._current(Generator.KIND, base_model))

    def generator_of(self, digest: str, base_model: str) -> Generator:
        """Return the generator with a network; raise `GeneratorNotFound` if the store does not have it."""
        for one in reversed(self.generators(base_model)):
            if one.blob == digest:
                return one
        raise GeneratorNotFound(f"there is no generator {digest[:12]}", hint="run `icm generators` to list them")

    def run(self, base_model: str) -> Run | None:
        """Return the training run of a base model that can be resumed."""
        return cast("Run | None", self._current(Run.KIND, base_model))

    def base_models(self) -> list[BaseRecord]:
        """Return the base models by name: those with facts or labels, and those that tasks name."""
        known = {base.name: base for base in self._described_bases()}
        return [known.get(name) or BaseRecord(name=name) for name in sorted({*known, *self.task_counts()})]

    def base_model(self, label: str) -> BaseRecord:
        """Return the base model that has a label; a new one if the store does not know it."""
        return next((base for base in self._described_bases() if label in base.names), BaseRecord(name=label))

    def base_name(self, label: str) -> str:
        """Return the name of the base model that has a label; the label itself if the store does not know it."""
        return self.base_model(label).name

    def task_counts(self) -> dict[str, int]:
        """Return base model -> number of its tasks."""
        # Compared as an expression: SQLite would look up the kind, and read every row for its base model.
        query = select(REFS.c.base, func.count()).where(REFS.c.kind.concat("") == Task.KIND).group_by(REFS.c.base)
        with self._db.read() as connection:
            return {row[0]: row[1] for row in connection.execute(query)}

    def tags(self) -> dict[str, int]:
        """Return how many tasks have each tag, by tag."""
        query = select(REFS.c.tags, func.count()).where(IS_TASK, REFS.c.tags != "").group_by(REFS.c.tags)
        counts: dict[str, tuple[str, int]] = {}  # by tag in lower case; it is shown as it was first written
        with self._db.read() as connection:
            for tags, count in connection.execute(query):
                for tag in tags.split():
                    shown, before = counts.get(tag.lower(), (tag, 0))
                    counts[tag.lower()] = shown, before + count
        return dict(counts[tag] for tag in sorted(counts))

    def changes(self) -> int:
        """Return a number that grows with every change, for programs that watch the store."""
        return self._db.changes()

    # Write.

    def publish(self, states: Sequence[S], *, remove: Sequence[State] = (), older: bool = False) -> list[S]:
        """Move refs to new states in one transaction, and remove others; return the states as they are stored.

        The blobs that they name must be durable. With `older`, a state may be of a version that is not the current one,
        which then stays as it is.

        Raises:
            LostRace: Another process changed one of them since it was read; nothing was written.
            TaskConflict: A new task has the name of a known one.
        """
        self._db.must_write()
        moment = self._moment()
        new = [_next(state, moment) for state in states]
        gone = [_next(Removed(of=one.KIND, name=one.ref, seq=one.seq, manifest=one.manifest), moment) for one in remove]
        # Removals last: if the command is killed and the database lost, the new name of a task must be there.
        written, removals = self._put_states(new), self._put_states(gone)
        try:
            with self._db.write() as connection:
                for state in remove:
                    remove_ref(connection, state)
                move(connection, new, written, [state.manifest for state in states], older=older)
                rows = [index_of(state, one.digest) for state, one in zip(gone, removals, strict=True)]
                replace_rows(connection, REFS, ("kind", "key"), rows)
                raise_seq(connection, [*new, *gone])
        except (LostRace, TaskConflict, DamagedStore):
            # Nothing refers to them, and if the database is lost they must not be mistaken for committed states.
            self.manifests.delete([one.digest for one in (*written, *removals)], newest=math.inf)
            raise
        return [replace(state, manifest=one.digest) for state, one in zip(new, written, strict=True)]

    def adopt(self, states: Sequence[State]) -> None:
        """Copy states of another store unchanged: their names are new here, and their manifests the same.

        Unless a name was removed here: then its states are published again, or the removal would count for them too.
        The blobs that they name must be durable. Give all versions of a task at once.

        Raises:
            TaskConflict, LostRace: The store has one of the names.
        """
        self._db.must_write()
        moment = self._moment()
        names = [Removed(of=state.KIND, name=state.ref).ref for state in states]
        removed = {name for name in set(names) if self.ref(Removed.KIND, name) is not None}
        states = [
            replace(state, seq=moment) if name in removed else state for state, name in zip(states, names, strict=True)
        ]
        written = self._put_states(states)
        with self._db.write() as connection:
            move(connection, states, written, [None] * len(states))
            raise_seq(connection, states)

    def update(self, name: str, change: Callable[[Task], Task]) -> Task:
        """Change a task: read it, change it, and swap it in; again if another process was faster.

        `change` must not have effects. If it returns an equal task, nothing is written.
        """
        return self._retried(lambda: self.task(name), change, older=split_version(name)[1] is not None)

    def update_base(self, label: str, change: Callable[[BaseRecord], BaseRecord]) -> BaseRecord:
        """Change the record of a base model, as `update` changes a task."""
        return self._retried(lambda: self.base_model(label), change)

    def update_generator(self, base_model: str, change: Callable[[Generator | None], Generator]) -> Generator:
        """Change the generator in use, or make the first one, as `update` changes a task."""
        while True:
            present = self.generator(base_model)
            new = change(present)
            if new == present:
                return new
            try:
                return self.publish([new])[0]
            except LostRace:
                continue

    def save_run(self, run: Run) -> Run:
        """Record a training run; its earlier checkpoint is deleted. The caller holds the job of the base model."""
        before = self.run(run.base_model)
        expected = None if before is None else before.manifest
        (saved,) = self.publish([replace(run, manifest=expected, updated_at=now())])
        if before is not None:
            self._discard(before, run.files)
        return saved

    def end_run(self, base_model: str, states: Sequence[S] = ()) -> list[S]:
        """Publish what a training run made, and remove the run with its checkpoint, in one transaction.

        The caller holds the job of the base model. Errors are as in `publish`.
        """
        run = self.run(base_model)
        if run is None:
            return self.publish(states) if states else []
        published = self.publish(states, remove=[run])
        self._discard(run, frozenset())
        return published

    @contextmanager
    def job(self, base_model: str, *, shared: bool = False) -> Iterator[None]:
        """Hold the job lock of a base model.

        One process at a time trains. Those that encode hold the lock `shared`. The store lock is given up while this
        waits, so nothing read before may be trusted inside the block.
        """
        self._db.must_write()
        with self._lock.job(base_model, shared=shared):
            yield

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Hold the store alone for a block; nothing read before may be trusted inside it."""
        self._db.must_write()
        with self._lock.exclusive():
            yield

    def refs(self) -> Iterator[dict[str, Any]]:
        """Yield every row of `refs`, few in memory at a time."""
        last: tuple[str, str] = ("", "")
        while True:
            after = or_(REFS.c.kind > last[0], (REFS.c.kind == last[0]) & (REFS.c.key > last[1]))
            query = select(REFS).where(after).order_by(REFS.c.kind, REFS.c.key).limit(PAGE)
            with self._db.read() as connection:
                page = [dict(row) for row in connection.execute(query).mappings()]
            yield from page
            if len(page) < PAGE:
                return
            last = page[-1]["kind"], page[-1]["key"]

    def ref(self, kind: str, name: str) -> str | None:
        """Return the digest of the manifest that a ref points to."""
        with self._db.read() as connection:
            found = connection.execute(ref_of(kind, name)).first()
        return None if found is None else str(found.manifest)

    def state(self, digest: str) -> State:
        """Return the state that a manifest describes; raise `DamagedStore` if it is missing or damaged."""
        return self._state(digest)

    def _selected(self, selection: Selection, *columns: Any) -> Select[Any]:
        needs_names = any(one.field.name == "base" for one in selection.filters)
        names = {base.name: base.names for base in self.base_models()} if needs_names else {}
        return selected(selection, names, *columns)

    def _pages(self, selection: Selection, *columns: Any) -> Iterator[Sequence[Any]]:
        """Yield rows in pages, each read in a transaction of its own unless an order or a limit needs a single one."""
        query = self._selected(selection, *columns)
        if selection.sort is not None or selection.limit is not None:
            with self._db.read() as connection:
                rows = connection.execute(query).all()
            yield from (rows[at : at + PAGE] for at in range(0, len(rows), PAGE))
            return
        last: str | None = None
        while True:
            page = query.limit(PAGE) if last is None else query.where(REFS.c.key > last).limit(PAGE)
            with self._db.read() as connection:
                rows = connection.execute(page).all()
            if rows:
                yield rows
            if len(rows) < PAGE:
                return
            last = key_of(Task.KIND, rows[-1].name)

    def undamaged(self, page: Sequence[Any], read: Callable[[Any], T]) -> Iterator[T]:
        """Yield each row as it is read, without those that are damaged, if anybody listens."""
        for row in page:
            try:
                found = read(row)
            except DamagedStore as error:
                if self._on_damage is None:
                    raise
                self._on_damage(str(row.name), error)
            else:
                yield found

    def _described_bases(self) -> list[BaseRecord]:
        """Return the base models with facts or labels."""
        with self._db.read() as connection:
            digests = connection.scalars(select(REFS.c.manifest).where(REFS.c.kind == BaseRecord.KIND)).all()
        return cast(list[BaseRecord], list(map(self._state, digests)))

    def _current(self, kind: str, name: str) -> State | None:
        with self._db.read() as connection:
            row = connection.execute(ref_of(kind, name)).first()
        return None if row is None else self._checked_state(row.manifest, kind, name)

    def _history(self, kind: str, name: str | None) -> list[State]:
        query = select(HISTORY.c.manifest).where(HISTORY.c.kind == kind)
        if name is not None:
            query = query.where(HISTORY.c.key == key_of(kind, name))
        with self._db.read() as connection:
            digests = connection.scalars(query.order_by(HISTORY.c.key, HISTORY.c.version)).all()
        self.manifests.fetch(digests)
        return list(map(self._state, digests))

    def _checked_task(self, digest: str, name: str) -> Task:
        return cast(Task, self._checked_state(digest, Task.KIND, name))

    def _checked_state(self, digest: str, kind: str, name: str) -> State:
        """Return a state; raise `DamagedStore` if it is not of the name that points to it: the database is wrong."""
        state = self._state(digest)
        if (state.KIND, key_of(kind, state.ref)) != (kind, key_of(kind, name)):
            fact = f"the database points {kind} {name!r} to a manifest of {state.KIND} {state.ref!r}"
            hint = "run `icm verify --repair` to rebuild the database from the manifests"
            raise DamagedStore(fact, path=self._db.place, hint=hint)
        return state

    def _read_state(self, digest: str) -> State:
        try:
            return decode(self.manifests.read(digest), self._shared, digest)
        except DamagedStore as error:
            if error.path is None:
                error.path = self.manifests.place(digest)
            raise

    def _read_shared(self, kind: type[Part], file: File) -> Mapping[str, Any]:
        return read_shared(kind, self.blobs.read(file))

    def _moment(self) -> int:
        """Return a number above every state's, and different from any simultaneous publication's.

        Two equal states would be one manifest, which the process that loses the race deletes.
        """
        with self._db.read() as connection:
            last = int(connection.scalar(select(META.c.seq)) or 0)
        return max(time.time_ns(), last) + 1 + secrets.randbelow(1_000_000)

    def _retried(self, read: Callable[[], S], change: Callable[[S], S], *, older: bool = False) -> S:
        while True:
            present = read()
            new = change(present)
            if new == present:
                return present
            try:
                return self.publish([new], older=older)[0]
            except LostRace:
                continue

    def _put_states(self, states: Sequence[State]) -> list[Written]:
        """Store manifests, after the documents that they share."""
        encoded = list(map(encode, states))
        documents = {digest: data for one in encoded for digest, data in one.documents.items()}
        self.blobs.put_all(list(documents.values()))
        digests = self.manifests.put_all([one.data for one in encoded])
        return [Written(digest, one.body) for digest, one in zip(digests, encoded, strict=True)]

    def _discard(self, run: Run, kept: frozenset[File]) -> None:
        """Delete an earlier state of a run with its blobs, which nothing else refers to."""
        if run.manifest is not None:
            self.manifests.delete([run.manifest])
        self.blobs.delete(run.files - kept)


def _next(state: S, moment: int) -> S:
    return replace(state, seq=max(state.seq + 1, moment), parent=state.manifest)
