"""Where the blobs of a store folder are that are not in it: at the address that its file BLOBS names."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, cast
from uuid import uuid4

from registry import files as fs
from registry.errors import DamagedStore, RegistryError

if TYPE_CHECKING:
    from registry.storage.blobs.objects import ObjectBackend
    from registry.storage.folder import StorePaths


def settle(paths: StorePaths, address: str) -> None:
    """Let the blobs of a store that is being made be at an address; a killed attempt goes on with its number.

    Raises:
        NotAStore: It is no address, or that of another store's blobs.
        StoreAway: It cannot be reached.
    """
    if not paths.place.exists():
        temporary = paths.tmp / "BLOBS"
        fs.unlink(temporary)
        fs.write_file(temporary, json.dumps({"place": address, "owner": uuid4().hex}).encode(), 0o444)
        fs.replace(temporary, paths.place)
        fs.fsync_dir(paths.root)
    far_blobs(paths).claim()


def far_blobs(paths: StorePaths) -> ObjectBackend:
    """Return what keeps the blobs of a store that has the file BLOBS."""
    with fs.store_errors(paths.place):
        text = paths.place.read_bytes()
    try:
        found = json.loads(text)
        address, owner = cast(str, found["place"]), cast(str, found["owner"])
    except (ValueError, TypeError, KeyError) as error:
        hint = "its two values are `place`, the address, and `owner`, which the object `owner` there has too"
        raise DamagedStore(f"{paths.place} is damaged", path=paths.place, hint=hint) from error
    try:
        from registry.storage.blobs.objects import connect
    except ImportError as error:
        hint = "install the extra: pip install 'icm-lora[team]'"
        raise RegistryError(f"the blobs of this store are at {address}: {error}", hint=hint) from error
    return connect(address, owner)
