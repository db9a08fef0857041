"""Make a store: `icm init`."""

from __future__ import annotations

from dataclasses import dataclass

from icmlora.errors import OptionsConflict
from icmlora.fleet.context import Context, use_case
from registry.errors import StoreNotFound
from registry.names import DatabaseUrl


@dataclass(frozen=True)
class InitReport:
    """A store, and where its bytes are."""

    store: str
    blobs: str
    is_new: bool  # False where it was there


@use_case
def init(context: Context, blobs: str | None = None) -> InitReport:
    """Make a store, unless it is there.

    Args:
        context: Where it is to be: a folder, or the address of a database, which exists and has no tables of others.
        blobs: Where its bytes are to be: `s3://BUCKET/PREFIX`, `gs://...`, `az://...`, or a folder that all machines
            have at the same path. By default the folder of the store.

    Raises:
        NotAStore: There is something else, or a store that has its bytes at another place.
        OptionsConflict: A store in a database has no folder for its bytes.
        StoreUnavailable: The database or the place of the bytes cannot be reached.
    """
    try:
        with context.open(read_only=True) as store:
            is_new = False
            if blobs is None:
                return InitReport(str(context.address), store.blobs.home, is_new)
    except StoreNotFound:
        is_new = True
        if blobs is None and isinstance(context.address, DatabaseUrl):
            hint = "specify storage with --blobs: s3://BUCKET/PREFIX, or a folder that all machines can reach"
            raise OptionsConflict("a store in a database needs storage for its files", hint=hint) from None
    with context.open(create=True, blobs=blobs) as store:
        return InitReport(str(context.address), store.blobs.home, is_new)
