"""What is built beside its target, locked as long as its process lives; what a killed run left there is unlocked.

The lock is taken after the entry can be seen, so another run may take it for abandoned in between and remove it. It
removes under the lock, and who builds looks whether the entry is still there once the lock is held.
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
from collections.abc import Callable
from pathlib import Path

_SUFFIX = re.compile(r"\.icm-[0-9a-f]{8}")


def locked_beside(target: Path, *, flags: int, create: Callable[[Path], object]) -> tuple[Path, int]:
    """Make a new, locked entry `NAME.icm-XXXXXXXX` in the target's folder.

    Args:
        target: What it will be renamed to.
        flags: How the entry is opened.
        create: Makes an empty entry of a given path.

    Returns:
        The entry, and the descriptor that holds the lock until it is closed.
    """
    while True:
        entry = target.with_name(f"{target.name}.icm-{secrets.token_hex(4)}")
        create(entry)
        try:
            descriptor = os.open(entry, flags)
        except FileNotFoundError:
            continue
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        if _is_at(entry, descriptor):
            return entry, descriptor
        os.close(descriptor)


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
        if suffix != entry.name and _SUFFIX.fullmatch(suffix):
            _remove_abandoned(entry, flags, remove)


def _remove_abandoned(entry: Path, flags: int, remove: Callable[[Path], object]) -> None:
    try:
        descriptor = os.open(entry, os.O_RDONLY | os.O_NOFOLLOW | flags)
    except OSError:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return
    else:
        remove(entry)
    finally:
        os.close(descriptor)


def _is_at(entry: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(entry.lstat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False
