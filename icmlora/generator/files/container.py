"""The container that codes, generator networks and few-shot starts share.

    prefix | length of head (4) | head, zlib | body | checksum (8)

The prefix is a magic number, four letters and a version; in codes the digest of their generator follows it. The body
is the words of integers, or the code inside a few-shot start. All integers are little-endian.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from icmlora.errors import CodeError, IcmLoraError, OtherFormat

# Bytes of a checksum: the first of the SHA-256 of the preceding content. It detects damage even outside a store.
CHECKSUM_SIZE = 8
LENGTH = struct.Struct("<I")  # format of the compressed head's length

ABSENT = 0xFFFF  # in place of a number of rank slots: the adapter has no such module


def counts_to_bytes(counts: NDArray[np.uint16], size: int) -> bytes:
    """Serialise counts of rank slots, (K, L), in one or two bytes each; `ABSENT` becomes the largest number."""
    return counts.astype(f"<u{size}").tobytes()


def counts_from_bytes(data: NDArray[np.uint8], size: int) -> NDArray[np.uint16]:
    """Read the output of `counts_to_bytes`, shape (K * L,)."""
    counts = data.view(f"<u{size}").astype(np.uint16)
    counts[counts == (1 << 8 * size) - 1] = ABSENT
    return counts


def check_magic(data: bytes, magic: bytes, name: str, error: type[IcmLoraError]) -> None:
    """Raise an error if data lack a magic number: `OtherFormat` if only the version differs."""
    if data.startswith(magic):
        return
    if data.startswith(magic[:4]) and checked(data) is not None:  # else the version byte may be damaged
        raise OtherFormat.of(name, data[4], magic[4])
    raise error(f"not an icm {name}, or damaged")


def add_checksum(content: bytes) -> bytes:
    """Return the content followed by its checksum."""
    return content + hashlib.sha256(content).digest()[:CHECKSUM_SIZE]


def checked(data: bytes) -> bytes | None:
    """Return the content before the checksum, or None if the two do not match."""
    content = data[:-CHECKSUM_SIZE]
    return content if add_checksum(content) == data else None


def write_container(prefix: bytes, head: bytes, body: bytes) -> bytes:
    """Return a container; equal parts give equal bytes."""
    packed = zlib.compress(head, 9)
    return add_checksum(prefix + LENGTH.pack(len(packed)) + packed + body)


def open_container(data: bytes, prefix: int) -> tuple[bytes, bytes] | None:
    """Return the compressed head and the body; None if the checksum is wrong or the data end early."""
    content = checked(data)
    begin = prefix + LENGTH.size
    if content is None or len(content) < begin:
        return None
    (length,) = LENGTH.unpack_from(content, prefix)
    return content[begin : begin + length], content[begin + length :]


def inflate(packed: bytes, least: int, most: int) -> bytes:
    """Decompress a head of bounded size, so a few bytes cannot demand gigabytes of memory.

    Raises:
        CodeError: It is damaged, or its length is not between `least` and `most` bytes.
    """
    stream = zlib.decompressobj()
    try:
        plain = stream.decompress(packed, most + 1)
    except zlib.error as error:
        raise CodeError("the code's header is damaged") from error
    if not stream.eof or stream.unused_data or not least <= len(plain) <= most:
        raise CodeError("the code's header has the wrong length")
    return plain


def split_fields(plain: bytes, sizes: Sequence[int]) -> list[NDArray[np.uint8]]:
    """Split a head into its fields, uint8 of shape (size,) each; `sizes` are in bytes and add up to its length."""
    return np.split(np.frombuffer(plain, dtype=np.uint8), np.cumsum(sizes)[:-1])
