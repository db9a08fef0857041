"""Pack extras: tensors and files of an adapter that a code cannot represent and that are stored exactly.

    "ICMX" 1 | width of an item (1) | length before packing (8) | zstd( safetensors file, its bytes in planes )
    "ICMX" 2 | references to tensors of the base model, see `base_references`

Numbers are stored in byte planes, all first bytes before all second bytes: signs and exponents of trained weights
repeat, and the rest hardly compresses. A large tensor has its own blob, so tasks that share a head or embedding rows
share the blob.
"""

from __future__ import annotations

import struct
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping

import zstandard

from icmlora.errors import DataError
from icmlora.formats.base_references import REFERENCES, BaseSource, resolve
from icmlora.io.safetensors import ITEM_BYTES, RawTensor, encode, raw_tensors, read_header

_HEAD = struct.Struct("<5sBQ")
_MAGIC = b"ICMX\x01"
_ALONE = 64 * 1024  # bytes: a larger tensor gets its own blob
_LEVEL = 9  # higher levels take several times longer for a gain below 1 %
MAX_BYTES = 8 * 1024**3


def tensor_files(tensors: Mapping[str, RawTensor]) -> Iterator[tuple[bytes, int]]:
    """Yield safetensors files to pack that together hold all tensors, each with the width of its numbers."""
    small: defaultdict[int, dict[str, RawTensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        if len(tensor.data) < _ALONE:
            small[ITEM_BYTES[tensor.dtype]][name] = tensor
    large = ({name: tensor} for name, tensor in tensors.items() if len(tensor.data) >= _ALONE)
    for group in (*large, *small.values()):
        yield encode(group, {}), max(ITEM_BYTES[tensor.dtype] for tensor in group.values())


def unpack_tensors(blobs: Iterable[bytes], base: Callable[[], BaseSource]) -> dict[str, RawTensor]:
    """Return the tensors of packed blobs; the base model is opened only for references."""
    tensors: dict[str, RawTensor] = {}
    for blob in blobs:
        if blob.startswith(REFERENCES):
            tensors |= resolve(blob, base())
            continue
        data = unpack(blob)
        tensors |= raw_tensors(data, read_header(data).tensors)
    return tensors


def unpack_extras(
    extras: Iterable[tuple[str | None, str]], read: Callable[[str], bytes], base: Callable[[], BaseSource]
) -> tuple[dict[str, RawTensor], dict[str, bytes]]:
    """Return tensors and files, by name, of extras given as (file name or None, digest of the blob)."""
    extras = list(extras)
    tensors = unpack_tensors((read(blob) for file, blob in extras if file is None), base)
    return tensors, {file: unpack(read(blob)) for file, blob in extras if file is not None}


def pack(data: bytes, width: int = 1) -> bytes:
    """Compress bytes losslessly; `width` is the size of their numbers in bytes."""
    compressor = zstandard.ZstdCompressor(level=_LEVEL, write_checksum=True)
    whole = len(data) - len(data) % width
    planes = b"".join(data[byte:whole:width] for byte in range(width)) + data[whole:]
    return _HEAD.pack(_MAGIC, width, len(data)) + compressor.compress(planes)


def unpack(packed: bytes) -> bytes:
    """Decompress the output of `pack`.

    Raises:
        DataError: The bytes are not packed, or are damaged.
    """
    try:
        width, length = _stated(packed)
        frame = packed[_HEAD.size :]
        # The decompressor allocates any length that a frame declares.
        if zstandard.frame_content_size(frame) != length:
            raise ValueError("its length differs from the declared length")
        planes = zstandard.ZstdDecompressor().decompress(frame)
        if len(planes) != length:
            raise ValueError("cut short")
    except (struct.error, ValueError, zstandard.ZstdError) as error:
        raise _unreadable(error) from error
    count, data = length // width, bytearray(planes)
    for byte in range(width):
        data[byte : count * width : width] = planes[byte * count : (byte + 1) * count]
    return bytes(data)


def unpacked_size(packed: bytes) -> int:
    """Return the unpacked size without unpacking; raises as `unpack` does."""
    try:
        return _stated(packed)[1]
    except (struct.error, ValueError) as error:
        raise _unreadable(error) from error


def _stated(packed: bytes) -> tuple[int, int]:
    magic, width, length = _HEAD.unpack_from(packed)
    if magic != _MAGIC or width not in (1, 2, 4, 8) or length > MAX_BYTES:
        raise ValueError("not packed by icm")
    return width, length


def _unreadable(error: Exception) -> DataError:
    return DataError(f"an extra of the adapter cannot be read: {error}")
