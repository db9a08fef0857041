"""Read the character strings out of an R lazy-load database, without R."""

import re
import struct
import zlib

HEADER = re.compile(rb"\x00[\x00-\x0f][\x00-\xff]\x09")  # of a string in R's XDR serialisation; its length follows
LONGEST = 5000  # bytes; a longer "string" is a header found by chance inside other data


def strings(database: bytes) -> list[list[str]]:
    """Return the strings of each object in an `.rdb` file: zlib streams, each after four bytes of length."""
    objects: list[list[str]] = []
    offset = 0
    while offset < len(database) - 8:
        stream = zlib.decompressobj()
        try:
            objects.append(_strings(stream.decompress(database[offset + 4 :])))
            offset = len(database) - len(stream.unused_data)
        except zlib.error:
            offset += 1
    return objects


def _strings(raw: bytes) -> list[str]:
    """Strings of one serialised object."""
    found: list[str] = []
    start = 0
    while header := HEADER.search(raw, start):
        at = header.end() + 4
        length = struct.unpack(">i", raw[at - 4 : at])[0] if at <= len(raw) else -1
        if 0 <= length < LONGEST and at + length <= len(raw):
            found.append(raw[at : at + length].decode("utf-8", "replace"))
            start = at + length
        else:
            start = header.start() + 1
    return found
