"""Make a store, or make it again for files whose database was lost: `icm init`."""

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
    is_new: bool  # False if it existed
    recovered: int | None = None  # tasks of a lost database that was rebuilt


@use_case
def init(context: Context, blobs: str | None = None, *, recover: bool = False) -> InitReport:
    """Make a store, unless it exists.

    Args:
        context: Where to make it: a folder, or the address of a database, which exists and has no other tables.
        blobs: Where to put its bytes: `s3://BUCKET/PREFIX`, `gs://...`, `az://...`, or a folder that all machines
            have at the same path. By default the folder of the store.
        recover: Rebuild a lost database from the manifests in `blobs`. Two databases must never share their files.

    Raises:
        NotAStore: There is something else, or a store that has its bytes at another place.
        OptionsConflict: A store in a database has no folder for its bytes.
        StoreUnavailable: The database or the place of the bytes cannot be reached.
    """
    if recover:
        return _recover(context, blobs)
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


def _recover(context: Context, blobs: str | None) -> InitReport:
    if blobs is None:
        hint = "run `icm verify --repair` to rebuild the database of a store folder"
        raise OptionsConflict("--recover needs --blobs, the location of the files", hint=hint)
    patience = context.patience
    assert patience is not None
    if isinstance(context.address, DatabaseUrl):
        from registry.storage.server import recover_server

        recover_server(context.address, blobs, command=context.command, patience=patience)
    else:
        from registry.storage.blobs.place import recover_location
        from registry.storage.folder import prepare_folder
        from registry.storage.paths import StorePaths, make_folders

        paths = StorePaths(context.address)
        prepare_folder(paths)
        make_folders(paths)
        recover_location(paths, blobs)
    with context.open(create=True, blobs=blobs) as store:
        return InitReport(str(context.address), store.blobs.home, is_new=False, recovered=store.rebuild().tasks)
