"""The bytes of a residual: what one code lacks to keep more of its adapter.

    ICMR 1 | digest of the code (32) | length of head (4) | head, zlib | range-coded words | check (8)
    head:  step (i2) | strengths (K*L x i1) | kept (K*L x u1) | scales (K*2*13 x i1)

The step is that of the residual's own integers. Strengths and `kept` take the place of the code's; there is never less
kept than by the code. The words are one integer for each of the code's, then norms and integers of the slots that the
code left out, as a code has them. Everything is little-endian, and everything that damages a code damages this.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from icmlora.errors import CodeError
from icmlora.generator.code import ABSENT, CodeHead, inflate
from icmlora.generator.config import GeneratorConfig
from icmlora.generator.entropy import Integers, Scales
from icmlora.generator.scales import EXTREME, LARGEST, SMALLEST
from icmlora.sealing import seal, unseal

MAGIC = b"ICMR\x01"
_START = len(MAGIC) + 36
_WIDTH = 4  # scale indices to a class: half an octave
CLASSES = 13
"""What a residual's scale depends on: whether the code's integer is zero, and if so, how likely that was."""


@dataclass(frozen=True, eq=False)
class ResidualHead:
    """Everything of a residual but its range-coded integers."""

    step: int
    """log2 of its quantiser step, in eighths."""
    strengths: NDArray[np.int8]
    """Shape (K, L): in the place of the code's."""
    kept: NDArray[np.uint8]
    """Shape (K, L): rank slots of code and residual together; 255 where the adapter has no such module."""
    scales: NDArray[np.int8]
    """Shape (K, 2, 13): scale index of the integers of each kind, side and class, as they were measured."""


@dataclass(frozen=True, eq=False)
class Residual:
    """What is added to one code."""

    code: str
    """SHA-256 of the code, in hexadecimal."""
    head: ResidualHead
    words: bytes

    def to_bytes(self) -> bytes:
        """Serialise; the same residual gives the same bytes."""
        head = self.head
        parts = (head.strengths, head.kept, head.scales)
        packed = zlib.compress(struct.pack("<h", head.step) + b"".join(part.tobytes() for part in parts), 9)
        return seal(MAGIC + bytes.fromhex(self.code) + struct.pack("<I", len(packed)) + packed + self.words)

    @classmethod
    def from_bytes(cls, data: bytes, code: bytes, under: CodeHead, config: GeneratorConfig) -> Residual:
        """Parse the residual of one code.

        Args:
            data: The residual.
            code: The code, whose digest it must name.
            under: The code's head.
            config: The configuration of the code's generator.

        Raises:
            CodeError: Not a residual, damaged, that of another code, or out of the code's range.
        """
        content = unseal(data)
        if content is None or len(content) < _START or not content.startswith(MAGIC):
            raise CodeError("this is not a residual of icm, or it is damaged or cut short")
        digest = content[len(MAGIC) : len(MAGIC) + 32].hex()
        if digest != digest_of(code):
            raise CodeError(f"the residual belongs to code {digest[:12]}, not {digest_of(code)[:12]}")
        (length,) = struct.unpack_from("<I", content, _START - 4)
        kinds, layers = len(config.kinds), config.layers
        sizes = [2, kinds * layers, kinds * layers, kinds * 2 * CLASSES]
        plain = inflate(content[_START : _START + length], sum(sizes), sum(sizes))
        parts = np.split(np.frombuffer(plain, dtype=np.uint8), np.cumsum(sizes)[:-1])
        head = ResidualHead(
            step=int(parts[0].view("<i2")[0]),
            strengths=parts[1].view(np.int8).reshape(kinds, layers),
            kept=parts[2].reshape(kinds, layers),
            scales=parts[3].view(np.int8).reshape(kinds, 2, CLASSES),
        )
        present = under.kept != ABSENT
        if (
            ((head.kept != ABSENT) != present).any()
            or (head.kept[present] < under.kept[present]).any()
            or int(head.kept[present].max()) > config.slots
            or (head.scales < SMALLEST).any()
            or (head.scales > LARGEST).any()
            or abs(head.step) > EXTREME
        ):
            raise CodeError("the residual's head is out of its code's range")
        return cls(digest, head, content[_START + length :])


def digest_of(code: bytes) -> str:
    """Return the SHA-256 of a code, by which its residual names it."""
    return hashlib.sha256(code).hexdigest()


def classes_of(integers: Integers, scales: Scales) -> NDArray[np.uint8]:
    """Return the class of each of a code's integers: 0 where it is not zero, else by the scale it was coded under.

    A zero under a small scale stands for a value near zero, one under a large scale for any within half a step.
    """
    likely = np.clip((scales.astype(np.int16) - SMALLEST) // _WIDTH, 0, CLASSES - 2)
    return np.where(integers == 0, likely + 1, 0).astype(np.uint8)
