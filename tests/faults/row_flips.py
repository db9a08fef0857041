"""Flip single bits of values that decide, behind the back of the database, and see what commands do then: on each pair.

What `flips.py` does with the bytes of a file, with the values of either database and the bytes in either place.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from registry.errors import IcmError
from registry.schema import Base
from tests.cli.tiny_fleet import icm_quietly
from tests.faults.flips import DECIDING, Commands, Tally, build
from tests.faults.pairs import Pair
from tests.faults.value_flips import Cells, engine_behind

KNOWN = {"extras": ["file"], "codes": ["blob_id"]}
"""Columns of which a false value is known to give a wrong adapter, or to delete, where nobody checks it."""
_RIGHT = "right"
_NEAR = 256  # above all numbers of rows: a number that is no row's decides little


class RowFlips:
    """The store of `flips.build` on a pair.

    Args:
        pair: The pair; it has no store yet.
        root: An empty folder.
    """

    def __init__(self, pair: Pair, root: Path, draw: random.Random) -> None:
        self._pair, self._draw = pair, draw
        local = build(root)
        pair.make()
        icm_quietly(local, "copy", local, pair.address)
        pair.save(_RIGHT)
        self._commands = Commands(pair.address, root, pair.digests)
        self._engine = engine_behind(pair.folder / "registry.db" if pair.postgres is None else pair.address)

    def study(self, columns: Mapping[str, Sequence[str]] = DECIDING, *, each: int) -> Iterator[tuple[str, Tally]]:
        """Flip so many bits of each column, one after the other, and yield what it came to."""
        for table, names in columns.items():
            for name in names:
                yield f"{table}.{name}", self._column(table, name, each)

    def _column(self, table: str, name: str, each: int) -> Tally:
        tally, cells = Tally(), Cells(Base.metadata.tables[table].columns[name])
        with self._engine.connect() as connection:
            rows = cells.rows(connection)
        flips = [(key, old, new) for key, old in rows.items() for new in cells.flips(old) if not _is_far(old, new)]
        self._draw.shuffle(flips)
        while flips and tally.flips < each:
            key, old, new = flips.pop()
            with self._engine.begin() as connection:
                if not cells.change(connection, key, new):
                    continue
            self._look(tally, f"{table}.{name} of {key}: {new!r} for {old!r}")
            self._pair.put_back(_RIGHT)
        return tally

    def _look(self, tally: Tally, what: str) -> None:
        tally.flips += 1
        found = self._is_noticed()
        tally.noticed += found
        tally.unnoticed += not found
        if not found:
            tally.note(f"unnoticed: {what}")
        self._commands.run(tally, what)

    def _is_noticed(self) -> bool:
        try:
            with self._pair.open() as store:
                return any(finding.is_problem for finding in store.verify())
        except IcmError:
            return True


def _is_far(old: Any, new: Any) -> bool:
    return isinstance(old, int) and isinstance(new, int) and old < _NEAR <= new
