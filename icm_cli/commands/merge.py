"""`icm merge`: combine several adapters into one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from icm_cli.command import Call, command
from icm_cli.errors import Interrupted
from icm_cli.session import Session
from icm_cli.text import as_fields
from icmlora.errors import Cancelled
from icmlora.fleet.write import merge as use_cases
from icmlora.io.text import human_size

if TYPE_CHECKING:
    from icmlora.fleet.write.merge import Merged


@command(use_cases.merge)
def merge(session: Session, call: Call[Merged]) -> None:
    try:
        done = call.run()
    except Cancelled as stop:
        raise Interrupted("interrupted; wrote nothing", hint="run the same command again") from stop
    out, where = session.out, None if done.directory is None else str(done.directory)
    fields = as_fields(done, "directory")
    out.document({"output": where, **fields})
    out.answer(where or str(done.task))
    parts = ", ".join(f"{part.weight:.3g} of {part.task}" for part in done.parts)
    out.note(f"merged {parts} with {done.method}: rank {done.rank}, {human_size(done.size)}")
    if done.task is not None:
        out.hint(
            f"run `icm train --update` to encode {done.task}, and `icm eval {done.task} --data FILE` to measure it"
        )
