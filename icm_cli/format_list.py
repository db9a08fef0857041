"""`icm convert --list-formats`: the formats of adapters that icm reads and writes."""

from __future__ import annotations

from icm_cli.output import Column
from icm_cli.session import Session

_COLUMNS = (
    Column("format"),
    Column("what it is", shrink=True),
    Column("read"),
    Column("written from", shrink=True),
    Column("code"),
)


def list_formats(session: Session) -> None:
    """Print which formats `icm ingest` reads, which `icm materialize` and `icm convert` write, and from which."""
    from icmlora.fleet.write.format_pairs import written_from
    from icmlora.formats import catalogue

    found = [(known.name, known.about, written_from(known)) for known in catalogue.FORMATS]
    session.out.document(
        [
            {"name": name, "about": about, "read": True, "written_from": list(sources), "code": True}
            for name, about, sources in found
        ]
    )
    for name, _, _ in found if session.out.is_quiet else ():
        session.out.answer(name)
    session.out.table(_COLUMNS, [(name, about, "yes", ", ".join(sources), "yes") for name, about, sources in found])
