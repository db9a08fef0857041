"""The only door to a store.

    with Store.open("loras.icm", create=True, command="icm ingest") as store:
        (weights,) = store.blobs.put_all([data])                      # bytes first, durable
        store.publish([Task(name="poems", ...)])                      # the commit point: refs move to new manifests
        store.update("poems", lambda task: replace(task, note="x"))   # read, change, compare and swap, again if lost
        data = store.blobs.read(store.task("poems").final.weights)

The maintenance methods import their code when they are called, because most commands do not need it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Self

from registry.manifests import Task
from registry.names import DatabaseUrl, address_of
from registry.states import OnDamage, StateStore
from registry.storage.locks import Deadline
from registry.storage.open import open_parts

if TYPE_CHECKING:
    from registry.findings import Finding, Rebuilt
    from registry.reachability import PruneReport
    from registry.storage.blobs.backend import BlobBackend
    from registry.usage import Usage


class Store(StateStore):
    """Manifests, refs and blobs of a fleet; see :meth:`open`."""

    @classmethod
    def open(
        cls,
        place: str | Path | DatabaseUrl,
        *,
        create: bool = False,
        read_only: bool = False,
        lock_timeout: float = 30.0,
        deadline: Deadline | None = None,
        command: str = "icm",
        backends: tuple[BlobBackend, BlobBackend] | None = None,
        blobs: str | None = None,
        cache: Callable[[], Path] | None = None,
        on_damage: OnDamage | None = None,
    ) -> Self:
        """Open a store and hold it, shared with others, until :meth:`close`.

        Args:
            place: the store folder, or the address of a database such as `postgresql://HOST/DATABASE`.
            create: create it if there is none; in a database only if `blobs` gives the location of the bytes.
            read_only: refuse writes; works on read-only media.
            lock_timeout: seconds to wait for other processes, in all.
            deadline: the seconds that are left, if the same command has other stores open.
            command: what this process does, for the message that others see.
            backends: where blobs and manifests are, if not where the store says.
            blobs: where a new store has its bytes, such as `s3://BUCKET/PREFIX`, if not in its folder.
            cache: returns the folder for copies of remote files.
            on_damage: called with the name of a task whose manifest cannot be read, when many tasks are read: the
                others are read without it. By default that is an error.

        Raises:
            StoreNotFound: There is none, and `create` is not set.
            StoreUnavailable: The database, or the place of the bytes, cannot be reached.
            NotAStore: There is something else, or a store that has its bytes elsewhere than `blobs`.
        """
        address, deadline = address_of(place), deadline or Deadline(lock_timeout)
        parts = open_parts(address, create=create, read_only=read_only, deadline=deadline, command=command, blobs=blobs)
        if backends is not None:
            parts = parts._replace(blobs=backends[0], manifests=backends[1])
        copies = None
        if parts.blobs.is_remote and cache is not None:
            from registry.storage.blobs.cache import BlobCache  # most stores have local blobs

            copies = BlobCache(cache)
        return cls(address, parts, cache=copies, on_damage=on_damage)

    def remove(self, tasks: Sequence[Task]) -> None:
        """Remove tasks with all their versions; their bytes go with the next `free` or `prune`.

        Raises:
            LostRace: A task has changed since it was read; nothing is removed.
        """
        self.parts.maintenance.run(lambda: self.publish([], remove=tasks))

    def free(self, files: Iterable[str] = (), names: Iterable[str] = ()) -> int | None:
        """Delete blobs, and earlier states of some tasks, that nothing reaches any more; return the bytes freed.

        None if another process uses the store for too long: the next `prune` deletes them.
        """
        from registry.reachability import free

        return free(self, files, names)

    def prune(
        self, *, grace: float | None = None, empty_quarantine: bool = False, dry_run: bool = False
    ) -> PruneReport:
        """Delete what no ref reaches and what killed commands left, if older than `grace` seconds.

        By default that is an hour, or a day for a remote place.

        Raises:
            DamagedStore: The database disagrees with the manifests; nothing was deleted.
        """
        from registry.reachability import prune

        return prune(self, grace=grace, empty_quarantine=empty_quarantine, dry_run=dry_run)

    def usage(self) -> Usage:
        """Return the bytes on disk by use."""
        from registry.usage import measure

        return measure(self)

    def verify(self, *, read_data: bool = False, names: Sequence[str] = ()) -> Iterator[Finding]:
        """Yield the findings; `read_data` also hashes every blob, `names` checks only these tasks."""
        from registry.verify import verify

        return verify(self, read_data=read_data, names=names)

    def repair(self, finding: Finding) -> str | None:
        """Correct one flipped bit of the damaged file of a finding, or move it to quarantine; return the result."""
        from registry.verify import repair

        with self.exclusive():
            return repair(self, finding)

    def rebuild(self) -> Rebuilt:
        """Write the database again from the manifests."""
        from registry.verify import rebuild

        return rebuild(self)
