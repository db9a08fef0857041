"""The bytes of a residual: a correction to one code, for more accuracy than the code gives alone.

    ICMR 3 | digest of the code (32) | length of head (4) | head, zlib | words | checksum (8)
    head:  step (i2) | strengths (K*L x i1) | kept (K*L x u1) | scales (K*2*13 x i1)

The step is that of the residual's own integers. Strengths and `kept` replace the code's; `kept` is never smaller than
the code's. Under generators of more than 254 rank slots it takes two bytes each.

The words are one integer for each of the code's inputs and outputs, then norms and integers of the slots that the code
left out, as a code has them (icmlora/generator/packing.py).
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from icmlora.errors import CodeError
from icmlora.generator.code import CodeHead
from icmlora.generator.config import GeneratorConfig
from icmlora.generator.container import (
    ABSENT,
    check_magic,
    counts_from_bytes,
    counts_to_bytes,
    inflate,
    open_container,
    split_fields,
    write_container,
)
from icmlora.generator.scales import EXTREME, LARGEST, SMALLEST

MAGIC = b"ICMR\x03"
_PREFIX = len(MAGIC) + 32  # bytes before the length of the head: the magic number and the code's digest
# Scales per side: one for integers next to a nonzero integer of the code, twelve for those next to a zero, by the scale
# that the zero was coded under.
CLASSES = 13


@dataclass(frozen=True, eq=False)
class ResidualHead:
    """Everything in a residual except its integers."""

    step: int  # log2 of its quantiser step, in eighths
    strengths: NDArray[np.int8]  # shape (K, L): these replace the code's
    kept: NDArray[np.uint16]  # shape (K, L): rank slots in code and residual together, or `ABSENT`
    # Shape (K, 2, 13): scale index of the integers of each kind, side and class, as they were measured.
    scales: NDArray[np.int8]


@dataclass(frozen=True, eq=False)
class Residual:
    """A correction to one code."""

    code: str  # SHA-256 of the code, in hexadecimal
    head: ResidualHead
    words: bytes

    def to_bytes(self, config: GeneratorConfig) -> bytes:
        """Serialise; the same residual gives the same bytes."""
        head = self.head
        kept = counts_to_bytes(head.kept, config.count_bytes)
        fields = [struct.pack("<h", head.step), head.strengths.tobytes(), kept, head.scales.tobytes()]
        return write_container(MAGIC + bytes.fromhex(self.code), b"".join(fields), self.words)

    @classmethod
    def from_bytes(cls, data: bytes, code: bytes, under: CodeHead, config: GeneratorConfig) -> Residual:
        """Parse the residual of one code."""
        check_magic(data, MAGIC, "residual", CodeError)
        opened = open_container(data, _PREFIX)
        if opened is None:
            raise CodeError("the residual is damaged or truncated")
        packed, words = opened
        digest = data[len(MAGIC) : _PREFIX].hex()
        if digest != digest_of(code):
            raise CodeError(f"the residual belongs to code {digest[:12]}, not {digest_of(code)[:12]}")
        head = _parse_head(packed, config)
        _check(head, under, config)
        return cls(digest, head, words)


def digest_of(code: bytes) -> str:
    """Return the SHA-256 of a code, by which its residual names it."""
    return hashlib.sha256(code).hexdigest()


def _parse_head(packed: bytes, config: GeneratorConfig) -> ResidualHead:
    kinds, layers = len(config.kinds), config.layers
    sizes = [2, kinds * layers, config.count_bytes * kinds * layers, kinds * 2 * CLASSES]
    parts = split_fields(inflate(packed, sum(sizes), sum(sizes)), sizes)
    return ResidualHead(
        step=int(parts[0].view("<i2")[0]),
        strengths=parts[1].view(np.int8).reshape(kinds, layers),
        kept=counts_from_bytes(parts[2], config.count_bytes).reshape(kinds, layers),
        scales=parts[3].view(np.int8).reshape(kinds, 2, CLASSES),
    )


def _check(head: ResidualHead, under: CodeHead, config: GeneratorConfig) -> None:
    is_present = under.kept != ABSENT
    if (
        ((head.kept != ABSENT) != is_present).any()
        or (head.kept[is_present] < under.kept[is_present]).any()
        or int(head.kept[is_present].max()) > config.slots
        or (head.scales < SMALLEST).any()
        or (head.scales > LARGEST).any()
        or abs(head.step) > EXTREME
    ):
        raise CodeError("the residual is out of its code's range")
