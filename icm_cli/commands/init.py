"""`icm init`: create a shared store."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Annotated

from icm_cli.command import plain_command as command
from icm_cli.options import argument, option
from icm_cli.session import Session
from icmlora.io.text import counted

StoreArg = Annotated[
    str | None, argument("[STORE]", "A folder or postgresql://HOST/DATABASE. Default: as for --store.")
]
BlobsOpt = Annotated[
    str | None,
    option(
        "--blobs LOCATION",
        "Storage for file contents: s3://BUCKET/PREFIX, gs://BUCKET/PREFIX, az://CONTAINER/PREFIX, or a folder at "
        "the same path on all machines. Default: the folder of the store.",
    ),
]
RecoverOpt = Annotated[
    bool,
    option(
        "--recover",
        "Rebuild the lost database of the store whose files are at --blobs. Never use it while that database exists.",
    ),
]


@command
def init(session: Session, address: StoreArg = None, blobs: BlobsOpt = None, recover: RecoverOpt = False) -> None:
    """Create a shared store in PostgreSQL and an object store.

    The database must exist. Blobs can also be in a shared folder. Their location is saved in the database, so other
    users need only the address of the store. A store in a single folder needs no `icm init`, because `icm ingest`
    creates it.

    Credentials are not saved. They are read from PGHOST, PGUSER, PGPASSWORD and ~/.pgpass, and from AWS_ACCESS_KEY_ID,
    AWS_SECRET_ACCESS_KEY, ~/.aws and the instance role.

    Example:
      icm init postgresql://db.example/fleet --blobs s3://loras/fleet
      export ICM_STORE=postgresql://db.example/fleet
    """
    from icmlora.fleet.context import address_of
    from icmlora.fleet.tasks.init import init as make

    context = session.context
    if address is not None:
        context = replace(context, address=address_of(address))
    if blobs is not None and "://" not in blobs:
        blobs = os.path.abspath(blobs)  # keep symlinks, which may differ between machines
    made = make(context, blobs, recover=recover)
    document: dict[str, object] = {"store": made.store, "blobs": made.blobs, "is_new": made.is_new}
    session.out.document(document if made.recovered is None else {**document, "recovered_count": made.recovered})
    session.out.answer(made.store)
    session.out.note(f"{'created' if made.is_new else 'found'} a store with blobs in {made.blobs}")
    if made.recovered is not None:
        session.out.note(f"rebuilt the database from the manifests: {counted(made.recovered, 'task')}")
