"""What a killed run left beside its target: built under a name of its own, and locked as long as its process lives."""

from __future__ import annotations

import fcntl
import os
import re
import secrets
from collections.abc import Callable
from pathlib import Path

_SUFFIX = re.compile(r"\.icm-[0-9a-f]{8}")


def name_beside(target: Path) -> Path:
    """Return a new `NAME.icm-XXXXXXXX` in the target's folder."""
    return target.with_name(f"{target.name}.icm-{secrets.token_hex(4)}")


def remove_leftovers(target: Path, *, flags: int, remove: Callable[[Path], object]) -> None:
    """Remove what runs for the same target left that are dead.

    Args:
        target: What they meant to write.
        flags: How such an entry is opened, besides for reading and without following links; one that cannot be opened
            so is left alone.
        remove: Removes one entry.
    """
    for entry in target.parent.iterdir():
        suffix = entry.name.removeprefix(target.name)
        if suffix != entry.name and _SUFFIX.fullmatch(suffix) and _is_abandoned(entry, flags):
            remove(entry)


def _is_abandoned(entry: Path, flags: int) -> bool:
    try:
        descriptor = os.open(entry, os.O_RDONLY | os.O_NOFOLLOW | flags)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True
