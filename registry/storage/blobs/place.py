"""Where the blobs of a store are that are not in its own folder: at an address that it keeps, with a number.

    s3://BUCKET/PREFIX, gs://..., az://...     an object store
    /a/folder                                  one that all machines have at the same path

The place has the number too, so that no two stores share one: each would prune what the other refers to.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast
from uuid import uuid4

from registry import files as fs
from registry.errors import DamagedStore, NotAStore, RegistryError
from registry.storage.blobs.backend import BlobBackend
from registry.storage.blobs.shared import SharedBackend

if TYPE_CHECKING:
    from registry.storage.paths import StorePaths

_OBJECTS = re.compile(r"[a-z0-9]+://")


class RemoteBackend(BlobBackend, Protocol):
    """A place of blobs that belongs to one store."""

    def check_free(self) -> None:
        """Raise what `claim` would raise, but before anything of a new store is written.

        Raises:
            NotAStore: It is a store's.
            StoreUnavailable: It cannot be reached.
        """
        ...

    def owner(self) -> str:
        """Return the number of the store whose place this is; raise `StoreUnavailable` if it has no owner."""
        ...

    def claim(self) -> None:
        """Make this the place of the store's blobs; twice is once.

        Raises:
            NotAStore: It is another store's.
            StoreUnavailable: It cannot be reached.
        """
        ...


def claim_location(paths: StorePaths, address: str) -> None:
    """Claim an address for the blobs of a new store folder; a killed attempt resumes with its number.

    Raises:
        NotAStore: It is no address, or holds another store's blobs.
        StoreUnavailable: It cannot be reached.
    """
    if not paths.place.exists():
        backends_at(address, "")  # before anything is written
        _write_place(paths, address, uuid4().hex)
    remote_blobs(paths, address)[0].claim()


def recover_location(paths: StorePaths, address: str) -> None:
    """Adopt the files at an address for a new store folder, because the earlier folder was lost."""
    if not paths.place.exists():
        _write_place(paths, address, backends_at(address, "")[0].owner())


def _write_place(paths: StorePaths, address: str, owner: str) -> None:
    temporary = paths.tmp / "BLOBS"
    fs.unlink(temporary)
    fs.write_file(temporary, json.dumps({"place": address, "owner": owner}).encode(), 0o444)
    fs.replace(temporary, paths.place)
    fs.fsync_dir(paths.root)


def remote_blobs(paths: StorePaths, asked: str | None = None) -> tuple[RemoteBackend, RemoteBackend]:
    """Return what keeps blobs and manifests of a store with a file BLOBS; `asked` is where they are expected to be.

    Raises:
        NotAStore: They are elsewhere.
    """
    if not paths.place.exists():
        raise elsewhere(str(paths.root), "in its own folder")
    with fs.store_errors(paths.place):
        text = paths.place.read_bytes()
    try:
        found = json.loads(text)
        address, owner = cast(str, found["place"]), cast(str, found["owner"])
    except (ValueError, TypeError, KeyError) as error:
        hint = "it must hold `place`, the address, and `owner`, the content of the object `owner` at that address"
        raise DamagedStore(f"{paths.place} is damaged", path=paths.place, hint=hint) from error
    if asked not in (None, address):
        raise elsewhere(str(paths.root), f"at {address}")
    return backends_at(address, owner)


def elsewhere(store: str, where: str) -> NotAStore:
    """Return the error for a store that was to have its blobs at another place."""
    hint = "a store cannot move its files; run `icm copy` to copy its tasks to a store with other storage"
    return NotAStore(f"{store} is already a store, with its files {where}", hint=hint)


def backends_at(address: str, owner: str) -> tuple[RemoteBackend, RemoteBackend]:
    """Return what keeps blobs and manifests of the store with a number at an address. Nothing is read yet.

    Raises:
        NotAStore: It is no address.
    """
    if not _OBJECTS.match(address):
        if not Path(address).is_absolute():
            hint = "use s3://BUCKET/PREFIX, or the absolute path of a folder that every machine can reach"
            raise NotAStore(f"{address!r} cannot hold the files of a store", hint=hint)
        return SharedBackend(Path(address), owner), SharedBackend(Path(address), owner, "manifests")
    try:
        from registry.storage.blobs.objects import connect
    except ImportError as error:
        hint = "install the extra: pip install 'icm-lora[team]'"
        raise RegistryError(f"the blobs of this store are at {address}: {error}", hint=hint) from error
    return connect(address, owner), connect(address, owner, "manifests")
