"""A check at the end of a file of our own: the beginning of the SHA-256 of everything before it.

It tells damage anywhere from a whole file, also outside a store, where no digest stands beside the bytes.
"""

from __future__ import annotations

import hashlib

_CHECK = 8


def seal(data: bytes) -> bytes:
    """Return bytes with their check."""
    return data + _check_of(data)


def unseal(data: bytes) -> bytes | None:
    """Return what was sealed, or None if that is not what is here any more."""
    content = data[:-_CHECK]
    return content if data[-_CHECK:] == _check_of(content) else None


def _check_of(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()[:_CHECK]
