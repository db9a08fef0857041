"""`icm formats`: list the formats of adapters that icm reads and writes."""

from __future__ import annotations

from icm_cli.output import Column
from icm_cli.session import Session, command

_COLUMNS = (
    Column("format"),
    Column("what it is", shrink=True),
    Column("read"),
    Column("written from", shrink=True),
    Column("code"),
)


@command
def formats(session: Session) -> None:
    """List the formats of adapters.

    READ says whether `icm ingest` takes the format, CODE whether its adapters can have codes. WRITTEN FROM lists the
    formats whose adapters `icm materialize --format` and `icm convert --format` write in it. Converting image adapters
    needs the extra `diffusion`, converting from and to gguf the configuration of the base model.

    Example:
      icm formats
    """
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
