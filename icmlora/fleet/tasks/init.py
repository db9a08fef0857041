"""Make a store, or make it again for files whose database was lost: `icm init`."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Annotated

from icmlora.errors import OptionsConflict
from icmlora.fleet.context import Context, use_case
from icmlora.fleet.params import Param
from registry.errors import StoreNotFound
from registry.names import DatabaseUrl
from registry.storage.blobs.place import recover_location
from registry.storage.paths import StorePaths, make_folders


@dataclass(frozen=True)
class InitReport:
    """A store, and where its bytes are."""

    store: str
    blobs: str
    is_new: bool  # False if it existed
    recovered: int | None = None  # tasks of a lost database that was rebuilt


def _absolute(blobs: str) -> str:
    """Return an absolute path with its symlinks, which may differ between machines; a URL stays as it is."""
    return blobs if "://" in blobs else os.path.abspath(blobs)


@use_case
def init(
    context: Context,
    blobs: Annotated[
        str | None,
        Param(
            "Storage for file contents: s3://BUCKET/PREFIX, gs://BUCKET/PREFIX, az://CONTAINER/PREFIX, or a folder at "
            "the same path on all machines. Default: the folder of the store.",
            "--blobs LOCATION",
            parse=_absolute,
        ),
    ] = None,
    *,
    recover: Annotated[
        bool,
        Param(
            "Rebuild the lost database of the store whose files are at --blobs. Never use it while that database "
            "exists."
        ),
    ] = False,
) -> InitReport:
    """Create a shared store in PostgreSQL and an object store.

    The database must exist. Blobs can also be in a shared folder. Their location is saved in the database, so other
    users need only the address of the store. A store in a single folder needs no `icm init`, because `icm ingest`
    creates it.

    Credentials are not saved. They are read from PGHOST, PGUSER, PGPASSWORD and ~/.pgpass, and from AWS_ACCESS_KEY_ID,
    AWS_SECRET_ACCESS_KEY, ~/.aws and the instance role.

    Example:
      icm init postgresql://db.example/fleet --blobs s3://loras/fleet
      export ICM_STORE=postgresql://db.example/fleet

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
    deadline = context.deadline
    assert deadline is not None
    if isinstance(context.address, DatabaseUrl):
        from registry.storage.server import recover_server

        recover_server(context.address, blobs, command=context.command, deadline=deadline)
    else:
        from registry.storage.folder import prepare_folder

        paths = StorePaths(context.address)
        prepare_folder(paths)
        make_folders(paths)
        recover_location(paths, blobs)
    with context.open(create=True, blobs=blobs) as store:
        return InitReport(str(context.address), store.blobs.home, is_new=False, recovered=store.rebuild().tasks)
