"""A little space that is kept so that a full disk can still be emptied.

On a full disk SQLite cannot even delete rows: it needs room for its journal. Giving up this file makes that room.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

from registry import fs
from registry.errors import StoreFull
from registry.paths import StorePaths

RESERVE_BYTES = 128 << 10

T = TypeVar("T")


def make_reserve(paths: StorePaths) -> None:
    """Write the reserve file if it is not there.

    Raises:
        OSError: no space for it.
    """
    if not paths.reserve.exists():
        temporary = paths.tmp / "reserve"
        fs.unlink(temporary)
        fs.write_file(temporary, bytes(RESERVE_BYTES), 0o600)
        fs.replace(temporary, paths.reserve)


def with_reserve(paths: StorePaths, delete: Callable[[], T]) -> T:
    """Run a deletion of rows; if the disk is full, give up the reserve and run it once more.

    The caller makes the reserve again when bytes are free, with :func:`restore_reserve`.

    Raises:
        StoreFull: even the reserve was not enough.
    """
    try:
        return delete()
    except StoreFull:
        with fs.store_errors(paths.reserve):
            fs.unlink(paths.reserve)
        return delete()


def restore_reserve(paths: StorePaths) -> None:
    """Make the reserve again if there is room for it by now."""
    with suppress(OSError):
        make_reserve(paths)
