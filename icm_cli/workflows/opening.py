"""How workflows open the store."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Place:
    """Which store a command works on, and how it waits for it.

    Attributes:
        path: The store folder.
        lock_timeout: Seconds to wait for another icm.
        command: The command line as other processes see it in their lock message.
    """

    path: Path
    lock_timeout: float = 30.0
    command: str = "icm"
