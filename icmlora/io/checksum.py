"""The checksum at the end of our own files: the first bytes of the SHA-256 of everything before them.

    content | SHA-256(content)[:8]

It detects damage anywhere in a file, also outside a store, where no digest of the whole file is at hand.
"""

from __future__ import annotations

import hashlib

CHECKSUM_SIZE = 8
"""Length of a checksum, in bytes."""


def add_checksum(content: bytes) -> bytes:
    """Return the content followed by its checksum."""
    return content + hashlib.sha256(content).digest()[:CHECKSUM_SIZE]


def checked(data: bytes) -> bytes | None:
    """Return the content in front of the checksum, or None if the two do not match."""
    content = data[:-CHECKSUM_SIZE]
    return content if add_checksum(content) == data else None
