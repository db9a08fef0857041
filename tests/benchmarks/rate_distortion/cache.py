"""Results as JSON lines that are only appended: a killed run goes on, and a cut last line is skipped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


class Cache:
    """Records by key. A later record of a key takes the place of an earlier one.

    Args:
        path: The file; it is made when the first record is added.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._records: dict[tuple[str, ...], dict[str, Any]] = {}
        if path.exists():
            for line in path.read_text(encoding="utf-8").split("\n"):
                self._read(line)

    def __len__(self) -> int:
        return len(self._records)

    def get(self, *key: str) -> dict[str, Any] | None:
        """Return the record of a key, or None."""
        return self._records.get(key)

    def add(self, *key: str, **fields: Any) -> dict[str, Any]:
        """Append a record and return it."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as stream:
            # A killed run may have left half a line; a new one must not grow on it.
            if stream.tell() and not self._ends_whole():
                stream.write("\n")
            stream.write(json.dumps({"key": key, **fields}, ensure_ascii=False, allow_nan=False) + "\n")
        self._records[key] = fields
        return fields

    def _ends_whole(self) -> bool:
        with self._path.open("rb") as stream:
            stream.seek(-1, 2)
            return stream.read(1) == b"\n"

    def _read(self, line: str) -> None:
        try:
            record = json.loads(line)
            self._records[tuple(record.pop("key"))] = record
        except (ValueError, KeyError, TypeError, AttributeError):
            return
