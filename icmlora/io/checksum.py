"""A check at the end of a file of our own: the beginning of the SHA-256 of everything before it.

It tells damage anywhere from a whole file, also outside a store, where no digest stands beside the bytes.
"""

from __future__ import annotations

import hashlib

CHECK = 8
"""Length of the check, in bytes: so much of a SHA-256."""


def seal(data: bytes) -> bytes:
    """Return bytes with their check."""
    return data + hashlib.sha256(data).digest()[:CHECK]


def unseal(data: bytes) -> bytes | None:
    """Return what was sealed, or None if that is not what is here any more."""
    content = data[:-CHECK]
    return content if seal(content) == data else None
