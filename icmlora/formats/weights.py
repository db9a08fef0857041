"""Read a weights file, checking its header before loading the rest."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from icmlora.errors import located
from icmlora.formats.format import AdapterFormat
from icmlora.formats.pairs.gguf_file import read_gguf
from icmlora.io import safetensors
from icmlora.io.files import read_exactly, read_regular


def read_weights(path: Path, known: AdapterFormat) -> bytes:
    """Read a whole weights file in a known format.

    Raises:
        AdapterRefused: The header is damaged, or does not fit the file size; only the header was read.
        UnsafeInput: The file exceeds the limits, or is a pickle.
    """
    with located(path):
        return read_regular(path, max_bytes=safetensors.MAX_FILE_BYTES, first=partial(check_head, known))


def check_head(known: AdapterFormat, descriptor: int, size: int) -> None:
    """Check the header of an open weights file against its size; raises as `read_weights` does."""
    if known.suffix in (None, ".safetensors"):
        safetensors.read_head(descriptor, size)
    elif known.suffix == ".gguf":
        read_gguf(read_exactly(descriptor, min(size, safetensors.MAX_HEADER_BYTES), 0), size)
