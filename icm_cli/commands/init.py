"""`icm init`: create a shared store."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

from icm_cli.command import Call, command
from icm_cli.session import Session
from icmlora.fleet.context import address_of
from icmlora.fleet.params import Param
from icmlora.fleet.tasks import init as initialisation
from icmlora.fleet.tasks.init import InitReport
from icmlora.io.text import counted

StoreArg = Annotated[str | None, Param("A folder or postgresql://HOST/DATABASE. Default: as for --store.", "[STORE]")]


@command(initialisation.init)
def init(session: Session, call: Call[InitReport], address: StoreArg = None) -> None:
    context = session.context if address is None else replace(session.context, address=address_of(address))
    done = call.use_case(context, **call.values)
    document: dict[str, object] = {"store": done.store, "blobs": done.blobs, "is_new": done.is_new}
    session.out.document(document if done.recovered is None else {**document, "recovered_count": done.recovered})
    session.out.answer(done.store)
    session.out.note(f"{'created' if done.is_new else 'found'} a store with blobs in {done.blobs}")
    if done.recovered is not None:
        session.out.note(f"rebuilt the database from the manifests: {counted(done.recovered, 'task')}")
