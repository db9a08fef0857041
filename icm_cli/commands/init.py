"""`icm init`: make a store."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Annotated

from icm_cli.options import argument, option
from icm_cli.session import Session, command

StoreArg = Annotated[str | None, argument("[STORE]", "A folder, or postgresql://HOST/DATABASE. Default: as --store.")]
BlobsOpt = Annotated[
    str | None,
    option(
        "--blobs PLACE",
        "Where its bytes are to be: s3://BUCKET/PREFIX, gs://BUCKET/PREFIX, az://CONTAINER/PREFIX, or a folder that "
        "all machines have at the same path. Default: the folder of the store.",
    ),
]


@command
def init(session: Session, place: StoreArg = None, blobs: BlobsOpt = None) -> None:
    """Make a store for a team: rows in PostgreSQL, bytes in an object store or a shared folder.

    A store in a folder needs no `icm init`: `icm ingest` makes it. The database has to exist. The store remembers where
    its bytes are, so everybody else needs its address alone.

    Credentials are not stored. They come from where other programs have them: PGHOST, PGUSER, PGPASSWORD and
    ~/.pgpass; AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, ~/.aws and the role of the machine.

    Example:
      icm init postgresql://db.example/fleet --blobs s3://loras/fleet
      export ICM_STORE=postgresql://db.example/fleet
      icm ingest ./loras
    """
    from icmlora.fleet.context import address_of
    from icmlora.fleet.tasks.init import init as make

    context = session.context
    if place is not None:
        context = replace(context, address=address_of(place))
    if blobs is not None and "://" not in blobs:
        blobs = os.path.abspath(blobs)  # a link in it stays one: machines may differ in what it is
    made = make(context, blobs)
    session.out.document({"store": made.store, "blobs": made.blobs, "is_new": made.is_new})
    session.out.answer(made.store)
    session.out.note(f"{'made' if made.is_new else 'found'} a store; its bytes are at {made.blobs}")
