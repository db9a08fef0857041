"""Detect that tasks may have changed without reading them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from registry.files import identity


@dataclass(frozen=True)
class Stamp:
    """The state of a file. It differs after a change, within the precision of the file system's clock.

    It does not open the file, because closing a database would drop the locks of other threads.

    Attributes:
        changed: When it was changed last, in seconds since 1970.
        parts: Other values that distinguish two states.
    """

    changed: float
    parts: tuple[int, ...]

    @classmethod
    def of(cls, path: Path) -> Stamp:
        """Return the stamp of a file. A missing file has a stamp too."""
        try:
            found = path.stat()
        except OSError:
            return cls(0, ())
        return cls(found.st_mtime, (*identity(found), found.st_ctime_ns))
