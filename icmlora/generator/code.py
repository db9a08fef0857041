"""The bytes of one task's code.

    ICMC 3 | generator digest (32) | length of head (4) | head, zlib | range-coded words | check (8)
    head:  step (i2) | condition (C x i1) | latent (Z x i1) | gains (K x i2) | strengths (K*L x i1) | kept (K*L x u1) |
           shifts (K*S x i1) | boosts (K*S x i1) | initial A (icmlora/generator/initial_bytes.py) | task type (utf-8)

ICMC 2 had neither shifts, boosts nor initial A; such a code is read as one of which no initial A is known.

`kept` holds the number of rank slots coded for each (kind, layer), 255 where the adapter has no such module. The words
are the rounded log-norms of all kept slots, then the integers of their two vectors, kind by kind. Everything is
little-endian. How many words there are follows from the head and the generator, so a code cannot claim more memory
than its generator's own layout allows.

The check is the beginning of the SHA-256 of everything before it: damage anywhere is refused, also outside a store.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from icmlora.adapter_config import MAX_LABEL
from icmlora.errors import CodeError
from icmlora.generator.config import GeneratorConfig
from icmlora.generator.initial_bytes import MADE_ELSEWHERE, initial_from_bytes, initial_size, initial_to_bytes
from icmlora.generator.scales import EXTREME
from icmlora.initial_a import InitialA
from icmlora.sealing import seal, unseal

MAGIC = b"ICMC\x03"
_BEFORE = b"ICMC\x02"
ABSENT = 255
_TASK_TYPE_LIMIT = 4 * MAX_LABEL  # in UTF-8


@dataclass(frozen=True, eq=False)
class CodeHead:
    """Everything of a code but its range-coded integers."""

    step: int
    """log2 of the quantiser step, in eighths."""
    condition: NDArray[np.int8]
    """Shape (C,)."""
    latent: NDArray[np.int8]
    """Shape (Z,)."""
    gains: NDArray[np.int16]
    """Shape (K,): the task's mean log2 norm above the table, in eighths."""
    strengths: NDArray[np.int8]
    """Shape (K, L): the decoded dW of a module is multiplied by 2^(strength / 64)."""
    kept: NDArray[np.uint8]
    """Shape (K, L)."""
    shifts: NDArray[np.int8]
    """Shape (K, S): how much of the inputs is left across the span of the initial A (`Span.shifts`)."""
    boosts: NDArray[np.int8]
    """Shape (K, S): how much longer refinement made that (`Span.boosts`)."""
    initial: InitialA | None
    task_type: str | None


@dataclass(frozen=True, eq=False)
class Code:
    """One task's code: it can be decoded with the generator it names and nothing else."""

    generator: str
    """SHA-256 of the generator file, in hexadecimal."""
    head: CodeHead
    words: bytes

    def to_bytes(self, config: GeneratorConfig) -> bytes:
        """Serialise; the same code of one generator gives the same bytes."""
        head = self.head
        plain = b"".join(
            [
                struct.pack("<h", head.step),
                head.condition.tobytes(),
                head.latent.tobytes(),
                head.gains.astype("<i2").tobytes(),
                head.strengths.tobytes(),
                head.kept.tobytes(),
                head.shifts.tobytes(),
                head.boosts.tobytes(),
                initial_to_bytes(head.initial, config),
                (head.task_type or "").encode(),
            ]
        )
        packed = zlib.compress(plain, 9)
        return seal(MAGIC + bytes.fromhex(self.generator) + struct.pack("<I", len(packed)) + packed + self.words)

    @classmethod
    def from_bytes(cls, data: bytes, config: GeneratorConfig) -> Code:
        """Parse a code made under one generator configuration.

        Raises:
            CodeError: Not a code, cut short, or out of the configuration's range.
        """
        generator, start = generator_of(data), len(MAGIC) + 36
        content = unseal(data)
        if content is None or len(content) < start:
            raise CodeError("the code is damaged or cut short")
        (length,) = struct.unpack_from("<I", content, start - 4)
        kinds, layers = len(config.kinds), config.layers
        sizes = [2, config.condition, config.latent, 2 * kinds, kinds * layers, kinds * layers]
        known = [kinds * config.slots, kinds * config.slots, initial_size(config)]
        if data.startswith(_BEFORE):
            least, blank = sum(sizes), bytes(sum(known))
        else:
            least, blank = sum(sizes) + sum(known), b""
        plain = inflate(content[start : start + length], least, least + _TASK_TYPE_LIMIT)
        plain = plain[: sum(sizes)] + blank + plain[sum(sizes) :]
        sizes += known
        parts = np.split(np.frombuffer(plain[: sum(sizes)], dtype=np.uint8), np.cumsum(sizes)[:-1])
        head = CodeHead(
            step=int(parts[0].view("<i2")[0]),
            condition=parts[1].view(np.int8),
            latent=parts[2].view(np.int8),
            gains=parts[3].view("<i2").astype(np.int16),
            strengths=parts[4].view(np.int8).reshape(kinds, layers),
            kept=parts[5].reshape(kinds, layers),
            shifts=parts[6].view(np.int8).reshape(kinds, config.slots),
            boosts=parts[7].view(np.int8).reshape(kinds, config.slots),
            initial=initial_from_bytes(parts[8].tobytes(), config),
            task_type=_text(plain[sum(sizes) :]),
        )
        present = head.kept[head.kept != ABSENT]
        if not config.are_modules(np.argwhere(head.kept != ABSENT).tolist()):
            raise CodeError("the code's head names a module twice, or one that there cannot be", hint=MADE_ELSEWHERE)
        if not len(present) or int(present.max()) > config.slots or abs(head.step) > EXTREME:
            raise CodeError("the code's head is out of its generator's range")
        return cls(generator, head, content[start + length :])


def inflate(packed: bytes, least: int, most: int) -> bytes:
    """Decompress exactly one zlib stream of a bounded size; a small one cannot grow into a large one.

    Raises:
        CodeError: It is damaged, or not alone, or of another size.
    """
    reader = zlib.decompressobj()
    try:
        plain = reader.decompress(packed, most + 1)
    except zlib.error as error:
        raise CodeError("the code's head is damaged") from error
    if not reader.eof or reader.unused_data or not least <= len(plain) <= most:
        raise CodeError("the code's head does not have the length its generator says")
    return plain


def _text(data: bytes) -> str | None:
    try:
        return data.decode() or None
    except UnicodeDecodeError as error:
        raise CodeError("the code's head is damaged") from error


def generator_of(data: bytes) -> str:
    """Return the digest of the generator that a code belongs to, without decoding it.

    Raises:
        CodeError: Not a code.
    """
    if not data.startswith((MAGIC, _BEFORE)) or len(data) < len(MAGIC) + 36:
        raise CodeError("this is not a code of icm, or it was cut short")
    return data[len(MAGIC) : len(MAGIC) + 32].hex()
