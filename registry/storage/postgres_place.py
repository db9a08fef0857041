"""Where the bytes of a store in PostgreSQL are: one row of a table of its own.

number     of the store: in the keys of its locks, and among its blobs (see blobs/place.py)
blobs      the address of its blobs
changes    how many transactions wrote: whoever serves tasks looks at it
crc        the check of number and blobs, as all rows have one
"""

from __future__ import annotations

from typing import NamedTuple
from uuid import uuid4

from sqlalchemy import BigInteger, Column, Connection, Integer, MetaData, String, Table, insert, select

from registry.errors import DamagedStore
from registry.row_checks import COLUMN, check_of
from registry.storage.database import DAMAGE_HINT

TABLE = Table(
    "place",
    MetaData(),
    Column("number", String, primary_key=True),
    Column("blobs", String, nullable=False),
    Column("changes", BigInteger, nullable=False),
    Column(COLUMN, Integer, nullable=False),
)


class Place(NamedTuple):
    """The number of a store, and the address of its blobs."""

    number: str
    blobs: str


def find(connection: Connection, where: str) -> Place | None:
    """Return the place, None if it is still to be added; raise `DamagedStore` if the row is not as it was written."""
    rows = connection.execute(select(TABLE)).all()
    if not rows:
        return None
    found = [Place(row.number, row.blobs) for row in rows if row.crc == check_of(TABLE.name, row.number, row.blobs)]
    if len(found) != len(rows) or len(found) > 1:
        fact = f"{where}: checksum mismatch in the row of {TABLE.name}"
        raise DamagedStore(fact, path=where, hint=DAMAGE_HINT)
    return found[0]


def add(connection: Connection, blobs: str) -> Place:
    """Give a store that is being made a number, and its blobs an address."""
    place = Place(uuid4().hex, blobs)
    connection.execute(insert(TABLE).values(**place._asdict(), changes=0, crc=check_of(TABLE.name, *place)))
    return place


def count_change(connection: Connection) -> None:
    """Let others see that a transaction has written, once it is committed."""
    connection.execute(TABLE.update().values(changes=TABLE.c.changes + 1))


def changes(connection: Connection) -> int:
    """Return how many transactions have written."""
    return int(connection.execute(select(TABLE.c.changes)).scalar_one())
