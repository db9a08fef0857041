"""The pairs of a database and a place of bytes that the tests of the registry run on, one for a run of pytest.

    pytest tests/registry --pair postgres+s3

A test asks for a store at a folder, and `place_of` says where that is. What is only about SQLite's file, or about a
folder of blobs, has a mark: `kept_in("sqlite", reason=...)`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from uuid import uuid4

from registry.names import DatabaseUrl
from tests.pg_server import drop_database, new_database

DEFAULT = "sqlite+folder"
PAIRS = (DEFAULT, "sqlite+s3", "postgres+folder", "postgres+s3")


@dataclass
class Pair:
    """The pair of a run of pytest.

    Attributes:
        name: One of `PAIRS`.
        server: The address of a PostgreSQL, if the pair needs one.
    """

    name: str = DEFAULT
    server: str = ""
    _places: dict[Path, tuple[Path | DatabaseUrl, str | None]] = field(default_factory=dict)

    @property
    def parts(self) -> list[str]:
        """What keeps the rows, and what keeps the bytes."""
        return self.name.split("+")

    def place_of(self, root: Path) -> tuple[Path | DatabaseUrl, str | None]:
        """Return the address of the store that stands for the one at a folder, and where it has its bytes."""
        if root not in self._places:
            database, blobs = self.parts
            address = root if database == "sqlite" else DatabaseUrl(new_database(self.server))
            far = f"s3://icm/{uuid4().hex}" if blobs == "s3" else str(root)
            self._places[root] = address, None if self.name == DEFAULT else far
        return self._places[root]

    @contextmanager
    def cleared(self) -> Iterator[None]:
        """Forget the stores that are made in a block, with their databases."""
        before = set(self._places)
        yield
        for root in set(self._places) - before:
            address, _ = self._places.pop(root)
            if isinstance(address, DatabaseUrl):
                drop_database(self.server, address.secret)


pair = Pair()
"""The one of this run."""
