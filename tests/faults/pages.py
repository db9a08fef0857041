"""Which byte of an SQLite file belongs to which column of which row: the file format, read from its own pages."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

_SIZES = {0: 0, 1: 1, 2: 2, 3: 3, 4: 4, 5: 6, 6: 8, 7: 8, 8: 0, 9: 0}
_INNER, _LEAF = (2, 5), (10, 13)


@dataclass(frozen=True)
class Place:
    """What a byte is part of."""

    offset: int
    table: str
    column: str  # "rowid" for the key that precedes a row
    part: Literal["type", "value"]


def places(path: Path) -> Iterator[Place]:
    """Yield every byte of the rows of all tables; those of pages, indexes and free space are left out."""
    with closing(sqlite3.connect(path)) as database:
        tables = database.execute("SELECT name, rootpage, sql FROM sqlite_schema WHERE type = 'table'").fetchall()
        columns = {name: database.execute(f"PRAGMA table_info({name})").fetchall() for name, _, _ in tables}
    data = path.read_bytes()
    for name, root, sql in tables:
        ordered = [row[1] for row in columns[name]]
        if "WITHOUT ROWID" in sql:
            keys = [row[1] for row in sorted(columns[name], key=lambda row: row[5]) if row[5]]
            ordered = [*keys, *(column for column in ordered if column not in keys)]
        yield from _Tree(data, name, ordered).page(root)


@dataclass(frozen=True)
class _Tree:
    data: bytes
    table: str
    columns: list[str]

    @property
    def size(self) -> int:
        return int.from_bytes(self.data[16:18], "big")

    def page(self, number: int) -> Iterator[Place]:
        base = (number - 1) * self.size
        head = base + (100 if number == 1 else 0)
        kind, count = self.data[head], self._int(head + 3, 2)
        cells = head + (12 if kind in _INNER else 8)
        for place in range(count):
            yield from self._cell(kind, base + self._int(cells + 2 * place, 2))
        if kind in _INNER:
            yield from self.page(self._int(head + 8, 4))

    def _cell(self, kind: int, at: int) -> Iterator[Place]:
        if kind in _INNER:
            yield from self.page(self._int(at, 4))
            at += 4
        if kind == 5:
            return
        length, width = self._varint(at)
        at += width
        if kind == 13:
            _, width = self._varint(at)
            yield from (Place(at + byte, self.table, "rowid", "value") for byte in range(width))
            at += width
        yield from self._record(self._payload(at, length, is_row=kind == 13))

    def _payload(self, at: int, length: int, *, is_row: bool) -> list[int]:
        """Return the offsets of the bytes of a row, which may go on in further pages."""
        most = self.size - 35 if is_row else (self.size - 12) * 64 // 255 - 23
        if length <= most:
            return list(range(at, at + length))
        least = (self.size - 12) * 32 // 255 - 23
        here = least + (length - least) % (self.size - 4)
        here = here if here <= most else least
        found, following = list(range(at, at + here)), self._int(at + here, 4)
        while following and len(found) < length:
            start = (following - 1) * self.size
            found += range(start + 4, start + 4 + min(length - len(found), self.size - 4))
            following = self._int(start, 4)
        return found

    def _record(self, offsets: list[int]) -> Iterator[Place]:
        row = _Tree(bytes(self.data[offset] for offset in offsets), self.table, self.columns)
        end, at = row._varint(0)
        value = end
        for column in self.columns:
            if at >= end:  # a column that was added later
                return
            kind, width = row._varint(at)
            length = _SIZES[kind] if kind in _SIZES else (kind - 12) // 2
            yield from (Place(offsets[at + byte], self.table, column, "type") for byte in range(width))
            yield from (Place(offsets[value + byte], self.table, column, "value") for byte in range(length))
            at, value = at + width, value + length

    def _int(self, at: int, width: int) -> int:
        return int.from_bytes(self.data[at : at + width], "big")

    def _varint(self, at: int) -> tuple[int, int]:
        value = 0
        for width in range(1, 9):
            byte = self.data[at + width - 1]
            value = value << 7 | byte & 127
            if byte < 128:
                return value, width
        return value << 8 | self.data[at + 8], 9
