"""`icm formats`: list the formats of adapters that icm reads and writes."""

from __future__ import annotations

from typing import get_args

from icm_cli.output import Column
from icm_cli.session import Session, command

_COLUMNS = (Column("format"), Column("what it is", shrink=True), Column("read"), Column("written"), Column("code"))


@command
def formats(session: Session) -> None:
    """List the formats of adapters.

    READ says whether `icm ingest` takes the format, CODE whether its adapters can have codes. WRITTEN says which
    adapters `icm materialize` writes in it: any that can be converted (with --format), or only its own.

    Example:
      icm formats
    """
    from icmlora.fleet.converting import FormatName
    from icmlora.formats.catalogue import formats as all_formats

    converted = get_args(FormatName)
    found = [(known.name, known.about, known.name in converted) for known in all_formats()]
    session.out.document(
        [
            {"name": name, "about": about, "read": True, "written": "any" if is_target else "own", "code": True}
            for name, about, is_target in found
        ]
    )
    for name, _, _ in found if session.out.is_quiet else ():
        session.out.answer(name)
    rows = [(name, about, "yes", "any" if is_target else "own", "yes") for name, about, is_target in found]
    session.out.table(_COLUMNS, rows)
