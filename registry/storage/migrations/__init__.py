"""How tables come from one schema to the next: by alembic, with a revision for each, which has the schema's number.

    8 ──versions/schema_9.py──▶ 9 ──versions/schema_10.py──▶ 10

The transaction that moves a store also writes its new number.

A new store gets the tables that `registry.schema` describes. Nothing of this is imported to open a store that has the
newest schema already.

While a revision runs, no trigger writes or compares checks of rows, and SQLite follows no references. So a revision
that changes the columns of a table writes the checks of its rows anew: see docs/design.md.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext

from registry.errors import DamagedStore
from registry.schema import Base
from registry.storage.database import DAMAGE_HINT

if TYPE_CHECKING:
    from sqlalchemy import Connection

HERE = Path(__file__).parent
VERSIONS = [HERE / "versions"]

# What revisions import from alembic, `op`, is one for all threads; each is here with its own store's lock to write.
_ONE_AT_A_TIME = threading.Lock()


def make_tables(connection: Connection) -> None:
    """Make the tables of a new store, and note their schema."""
    Base.metadata.create_all(connection)
    with _alembic(connection) as config:
        command.stamp(config, "head")


def move_tables(connection: Connection, schema: int, place: str) -> None:
    """Run the revisions that come after a schema.

    Raises:
        DamagedStore: The tables are noted to have another one.
    """
    noted = MigrationContext.configure(connection).get_current_heads()
    if noted not in ((), (str(schema),)):
        fact = f"{place} records two schemas: {schema} and {', '.join(noted)}"
        raise DamagedStore(fact, path=place, hint=DAMAGE_HINT)
    with _alembic(connection) as config:
        if not noted:  # made before icm had alembic
            command.stamp(config, str(schema))
        command.upgrade(config, "head")


@contextmanager
def _alembic(connection: Connection) -> Iterator[Config]:
    config = Config(attributes={"connection": connection})
    for name, value in (
        ("script_location", str(HERE)),
        ("path_separator", "newline"),
        ("version_locations", "\n".join(map(str, VERSIONS))),
    ):
        config.set_main_option(name, value.replace("%", "%%"))  # which names other options there
    with _ONE_AT_A_TIME:
        yield config
