"""What tells that tasks may have changed, without looking at them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from registry.files import identity


@dataclass(frozen=True)
class Stamp:
    """What a file looks like from outside; it differs after a change, up to the steps of the file system's clock.

    From outside: opening and closing a database would drop the locks of other threads.

    Attributes:
        changed: When it was changed last, in seconds since 1970.
        parts: What else tells one state from another.
    """

    changed: float
    parts: tuple[int, ...]

    @classmethod
    def of(cls, path: Path) -> Stamp:
        """Look at a file; one that is absent has a stamp too."""
        try:
            found = path.stat()
        except OSError:
            return cls(0, ())
        return cls(found.st_mtime, (*identity(found), found.st_ctime_ns))
