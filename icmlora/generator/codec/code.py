"""The bytes of one task's code.

    ICMC 5 | generator digest (32) | length of head (4) | head, zlib | words | checksum (8)
    head:  step (i2) | condition (C x i1) | latent (Z x i1) | gains (K x i2) | strengths (K*L x i1) | kept (K*L x u1) |
           shifts (K*S x i1) | boosts (K*S x i1) | initial A (icmlora/generator/initial_a/draw.py) | task type (utf-8)

K module kinds, L layers, S rank slots, C condition and Z latent come from the generator's configuration. Under
generators of more than 254 rank slots `kept`, and the ranks of the initial A, take two bytes each.

`kept` holds the number of rank slots coded for each (kind, layer), the largest number (255 or 65,535) where the adapter
has no such module. The words hold the rounded log-norms and the vectors of these slots, kind by kind
(icmlora/generator/codec/packing.py). The number of integers follows from the head and the generator, so a code cannot
claim more memory than its generator's own layout allows.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from icmlora.errors import CodeError
from icmlora.generator.config import GeneratorConfig
from icmlora.generator.files.container import (
    ABSENT,
    check_magic,
    counts_from_bytes,
    counts_to_bytes,
    inflate,
    open_container,
    split_fields,
    write_container,
)
from icmlora.generator.initial_a.draw import (
    MADE_ELSEWHERE,
    InitialA,
    initial_from_bytes,
    initial_size,
    initial_to_bytes,
)
from icmlora.generator.scales import EXTREME

MAGIC = b"ICMC\x05"
_PREFIX = len(MAGIC) + 32  # bytes before the length of the head: the magic number and the generator's digest
# In bytes: the limit of a PEFT label in characters, at up to four bytes each in UTF-8.
_TASK_TYPE_LIMIT = 4 * 1024


@dataclass(frozen=True, eq=False)
class CodeHead:
    """Everything in a code except the integers in its words."""

    step: int  # log2 of the quantiser step, in eighths
    condition: NDArray[np.int8]  # shape (C,)
    latent: NDArray[np.int8]  # shape (Z,)
    gains: NDArray[np.int16]  # shape (K,): how far the task's mean log2 norm is above the generator's table, in eighths
    strengths: NDArray[np.int8]  # shape (K, L): the decoded dW of a module is multiplied by 2^(strength / 64)
    kept: NDArray[np.uint16]  # shape (K, L): coded rank slots of each module, or `ABSENT`
    shifts: NDArray[np.int8]  # shape (K, S): `InitialSubspace.shifts`.
    boosts: NDArray[np.int8]  # shape (K, S): `InitialSubspace.boosts`.
    initial: InitialA | None  # where the adapter's initial A was drawn, None if unknown
    task_type: str | None  # PEFT's task type, such as CAUSAL_LM


@dataclass(frozen=True, eq=False)
class ParsedCode:
    """One task's code; only the generator that it names can decode it."""

    generator: str  # SHA-256 of the generator file, in hexadecimal
    head: CodeHead
    words: bytes

    def to_bytes(self, config: GeneratorConfig) -> bytes:
        """Serialise; equal codes of one generator give equal bytes."""
        head = self.head
        fields = [
            struct.pack("<h", head.step),
            head.condition.tobytes(),
            head.latent.tobytes(),
            head.gains.astype("<i2").tobytes(),
            head.strengths.tobytes(),
            counts_to_bytes(head.kept, config.count_bytes),
            head.shifts.tobytes(),
            head.boosts.tobytes(),
            initial_to_bytes(head.initial, config),
            (head.task_type or "").encode(),
        ]
        return write_container(MAGIC + bytes.fromhex(self.generator), b"".join(fields), self.words)

    @classmethod
    def from_bytes(cls, data: bytes, config: GeneratorConfig) -> ParsedCode:
        """Parse a code of this configuration; raise `CodeError` if it is damaged, or of another version or range."""
        generator = generator_of(data)
        opened = open_container(data, _PREFIX)
        if opened is None:
            raise CodeError("the code is damaged or truncated")
        packed, words = opened
        kinds, layers, slots = len(config.kinds), config.layers, config.slots
        sizes = [2, config.condition, config.latent, 2 * kinds, kinds * layers, config.count_bytes * kinds * layers]
        sizes += [kinds * slots, kinds * slots, initial_size(config)]
        plain = inflate(packed, sum(sizes), sum(sizes) + _TASK_TYPE_LIMIT)
        parts = split_fields(plain[: sum(sizes)], sizes)
        try:
            task_type = plain[sum(sizes) :].decode() or None
        except UnicodeDecodeError as error:
            raise CodeError("the code's header is damaged") from error
        head = CodeHead(
            step=int(parts[0].view("<i2")[0]),
            condition=parts[1].view(np.int8),
            latent=parts[2].view(np.int8),
            gains=parts[3].view("<i2").astype(np.int16),
            strengths=parts[4].view(np.int8).reshape(kinds, layers),
            kept=counts_from_bytes(parts[5], config.count_bytes).reshape(kinds, layers),
            shifts=parts[6].view(np.int8).reshape(kinds, slots),
            boosts=parts[7].view(np.int8).reshape(kinds, slots),
            initial=initial_from_bytes(parts[8].tobytes(), config),
            task_type=task_type,
        )
        is_present = head.kept != ABSENT
        if not config.are_modules(np.argwhere(is_present).tolist()):
            raise CodeError("the code's header names a module twice, or an impossible module", hint=MADE_ELSEWHERE)
        # A module has no more singular values than its smaller width.
        most = np.array([min(slots, kind.inputs, kind.outputs) for kind in config.kinds])[:, None]
        if not is_present.any() or (is_present & (head.kept > most)).any() or abs(head.step) > EXTREME:
            raise CodeError("the code's header is out of its generator's range")
        return cls(generator, head, words)


def generator_of(data: bytes) -> str:
    """Return the digest of the generator that a code belongs to, without decoding the code."""
    check_magic(data, MAGIC, "code", CodeError)
    if len(data) < _PREFIX + 4:
        raise CodeError("the code is truncated")
    return data[len(MAGIC) : _PREFIX].hex()
