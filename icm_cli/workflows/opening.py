"""How workflows open the store."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from registry.store import Store


@dataclass(frozen=True)
class Place:
    """Which store a command works on, and how it waits for it.

    Attributes:
        path: The store folder.
        lock_timeout: Seconds to wait for another icm.
        command: The command as other processes see it in their lock message.
    """

    path: Path
    lock_timeout: float = 30.0
    command: str = "icm"

    def open(self, *, create: bool = False, read_only: bool = False) -> Store:
        """Open the store, as a context manager; see `registry.store.Store.open` for what it raises."""
        # SQLAlchemy takes most of the time that a short command has, so commands without a store never import it.
        from registry.store import Store

        return Store.open(
            self.path, create=create, read_only=read_only, lock_timeout=self.lock_timeout, command=self.command
        )
