"""What a blob is, by how it begins: a row may say of it only what it is."""

from __future__ import annotations

from typing import Literal

BlobKind = Literal["code", "generator", "residual", "task vectors", "weights"]

_STARTS: dict[bytes, BlobKind] = {
    b"ICMC": "code",
    b"ICMG": "generator",
    b"ICMR": "residual",
    b"ICMT": "task vectors",
    b"GGUF": "weights",
}
_MAX_HEADER = 100 << 20
"""More than the header of any safetensors file has."""


def kind_of(start: bytes) -> BlobKind | None:
    """Return what a blob is by its first bytes, at least nine of them; None for anything else, such as text."""
    # A safetensors file begins with the length of its header, which is JSON.
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= _MAX_HEADER:
        return "weights"
    return _STARTS.get(start[:4])
